"""The NumPy interpreter of Relax modules, and the rules of its operators: what every bundle must compute."""
