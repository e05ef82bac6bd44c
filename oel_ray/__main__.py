"""`python -m oel_ray` is `oel`: the driver process."""

from oel_ray.cli.main import main

if __name__ == "__main__":
    main()
