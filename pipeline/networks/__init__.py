"""What backbone plug-ins are built of: networks up to their last maps, and how a tap is found in others."""
