"""Runs that go on by themselves: started in the background, and ended later."""
