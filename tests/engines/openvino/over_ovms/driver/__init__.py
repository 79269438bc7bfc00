"""The driver's own tests of every service, over the stand-in for ovms."""
