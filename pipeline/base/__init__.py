"""What every room shares: errors, parameters, plug-in lookup, random streams, outputs, progress."""
