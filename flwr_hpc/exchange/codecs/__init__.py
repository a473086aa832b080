"""One codec a file; `exchange.codec` names the file."""
