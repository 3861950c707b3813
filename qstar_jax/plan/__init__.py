"""What programs need on hardware that is not there: topologies to compile for, and a reader of compiled programs."""
