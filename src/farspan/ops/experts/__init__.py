"""Retrieved experts: the choice of k of P² single neurons by product keys, and their weighted sum."""
