"""Doors that train. A package for the sake of installed commands, which find it as phase8.doors.launch."""
