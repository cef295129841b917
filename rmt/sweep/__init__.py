"""Many runs from one YAML file, on this machine, a Ray cluster or SLURM: `rmt sweep`. See `rmt.sweep.drive`."""
