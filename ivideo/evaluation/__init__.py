"""How good a stage or a cascade is: prompt following, fidelity, and the figures made of them."""
