"""`python -m nanoworks` is the `nanoworks` command; torchrun starts it this way."""

from nanoworks.cli.main import main

main()
