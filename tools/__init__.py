"""The command-line tools: arguments, files and exit statuses around :mod:`thinpool`."""
