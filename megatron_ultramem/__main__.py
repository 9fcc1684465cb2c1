"""`python -m megatron_ultramem`, which is what torchrun starts."""

from megatron_ultramem.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
