"""Forms a cluster: discovery, a password-authenticated key exchange, link measurement, ring order."""
