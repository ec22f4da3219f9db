"""`python -m jaxpar`: see `jaxpar.cli`."""

from jaxpar.cli import main

if __name__ == "__main__":
    main()
