"""How weights travel: codecs over stores, behind Flower's Grid."""
