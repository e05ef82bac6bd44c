"""`python -m oel_ray` is `oel`."""

from oel_ray.cli import main

if __name__ == "__main__":
    main()
