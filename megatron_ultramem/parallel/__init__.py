"""Memory-parallel: value tables sharded over ranks, and the exchanges that look values up in them."""
