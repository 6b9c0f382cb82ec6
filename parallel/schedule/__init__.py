"""Pipeline schedules as plain data: generated, checked, simulated, executed and drawn from one object."""
