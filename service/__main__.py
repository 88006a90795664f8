"""`python -m service` is `cplab`."""

from service.cli import main

main()
