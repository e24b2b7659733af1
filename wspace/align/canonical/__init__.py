"""One form for every state of an orbit: balanced scales, ranked units, settled signs."""
