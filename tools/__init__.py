"""Doors for everything beside training. A package for the sake of installed commands, which find it as phase8.doors.tools."""
