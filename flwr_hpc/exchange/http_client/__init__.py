"""The site's half of the exchange over HTTP: a connection that outlives cuts, and what it moves."""
