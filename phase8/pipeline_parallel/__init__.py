"""Pipeline parallelism: schedules as data, lowered to instructions, simulated, and executed by an engine that knows no schedule."""
