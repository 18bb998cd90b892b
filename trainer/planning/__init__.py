"""What a recipe needs before anything is loaded: parameters, memory per GPU under each engine, steps."""
