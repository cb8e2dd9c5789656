"""`python -m deme_diffusion` is `deme`."""

from deme_diffusion.cli import main

if __name__ == "__main__":
    main()
