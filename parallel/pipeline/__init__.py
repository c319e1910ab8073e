"""Pipeline parallelism: the layers are cut into stages, each on ranks of its own."""
