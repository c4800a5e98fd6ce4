"""Every target by name, those that the campaign shall be sure to reach first."""

from fuzz import cache_targets, data_targets, directory_target, parameter_targets, url_target, weight_targets

ROOMS = (cache_targets, url_target, weight_targets, data_targets, parameter_targets, directory_target)
TARGETS = {target.name: target for room in ROOMS for target in room.TARGETS}
