"""One kind of store a file; the scheme of `exchange.store` names the file."""
