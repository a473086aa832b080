"""Hosts that are reached by the system's OpenSSH: jump hosts and second factors are its matter."""
