"""Find the experts that successful jailbreaks activate: pairs, spans, counts, scores, selection."""
