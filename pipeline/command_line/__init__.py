"""The command line `h2t`: parses arguments, calls the other rooms, prints results."""
