"""Ways to run a cluster: Ray's launcher, KubeRay, Slurm; and the advice for what goes wrong."""
