"""The pipeline around the feature cache: data, backbone, extraction, stage II, evaluation, report, command line."""
