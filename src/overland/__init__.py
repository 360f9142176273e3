"""overland moves running machines between hosts of an overlay network without losing a packet."""
