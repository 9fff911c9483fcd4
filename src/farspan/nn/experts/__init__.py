"""Feed-forwards with experts: product-key retrieval of single neurons (`cdmoe`, `peer`) and routed MLPs (`seimoe`)."""
