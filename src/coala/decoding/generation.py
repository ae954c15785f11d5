"""The decoding loop: which token comes next. Knows the model only through ``LanguageModel`` and ``Prefix``.

Every choice is coupled to unguided decoding. A step draws one Gumbel variable g(c) per token c of the restricted base
distribution p, a function of (seed, prompt, step, c) alone. The unguided token is ``argmax log p(c) + g(c)``, an exact
sample of p (the Gumbel-max trick). Guided decoding asks the head about the k tokens with the largest ``log p + g``, k
distinct samples of p without replacement, and takes

    argmax over these k of  log p(c) + strength * score(c) + g(c),

with the scores normalised over the k (App. H.3). So strength 0 gives the unguided text token for token, a guided text
leaves the unguided one only where the head outweighs chance, and as k grows to the whole nucleus the choice becomes an
exact sample of ``p exp(strength * score)``. Sampling once more among k candidates, as App. H.3 describes, sharpens the
distribution even at strength 0, for the likely tokens are among the candidates more often: a lower perplexity that the
head has no part in. Temperature 0 leaves the noise out.

A stop token ends the reply and is not part of it: as a candidate it is worth what the reply is worth as it stands
(with ``ends_with_eos`` features, which count the stop token, it is scored like any other).
"""
