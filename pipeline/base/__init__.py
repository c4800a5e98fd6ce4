"""Code that every room uses: errors, parameters, plug-in lookup, random streams, outputs, progress bars."""
