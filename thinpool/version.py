"""The version of the project, in the one place that the packaging and the tools read."""

VERSION = "1.3.3"
"""Three numbers, because volume managers parse them: the release of thin-provisioning-tools whose options we have."""
