"""Slow references of the hosts' losses in float64, one number at a time, from the papers' formulas.

Reference(state, features (E, B, D), labels, noise) -> loss, for the class counts `COUNTS` of the conformance checks.
"""

import math

import numpy as np
from conformance import COUNTS


def logits_by_hand(w, b, x):
    """Mean over experts of w x + b for one sample: w (E, K, D), b (E, K), x (E, D) -> list of K."""
    experts, classes, size = w.shape
    return [
        sum(sum(w[e, j, d] * x[e, d] for d in range(size)) + (b[e, j] if b is not None else 0) for e in range(experts))
        / experts
        for j in range(classes)
    ]


def cosines_by_hand(w, x):
    experts, classes, _ = w.shape
    return [
        sum(
            float(np.dot(w[e, j], x[e])) / math.sqrt(float((w[e, j] ** 2).sum()) * float((x[e] ** 2).sum()))
            for e in range(experts)
        )
        / experts
        for j in range(classes)
    ]


def minus_log_p(z, y):
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z)) - z[y]


def ce_reference(s, x, labels, noise):
    return sum(minus_log_p(logits_by_hand(s["weight"], s["bias"], x[:, i]), y) for i, y in enumerate(labels)) / len(
        labels
    )


def scaled_logits(s, x):
    one = {
        k: s[k] * s["class_scale"][..., None] if k == "weight" else s[k] * s["class_scale"] for k in ("weight", "bias")
    }
    return logits_by_hand(one["weight"], one["bias"], x)


def lws_reference(s, x, labels, noise):
    return sum(minus_log_p(scaled_logits(s, x[:, i]), y) for i, y in enumerate(labels)) / len(labels)


def mislas_reference(s, x, labels, noise):
    high, low, total = max(COUNTS), min(COUNTS), 0.0
    for i, y in enumerate(labels):
        e = 0.1 + 0.3 * math.sin((COUNTS[y] - low) * math.pi / (2 * (high - low)))
        z = scaled_logits(s, x[:, i])
        total += (1 - e) * minus_log_p(z, y) + e * sum(minus_log_p(z, j) for j in range(len(z))) / len(z)
    return total / len(labels)


def gcl_reference(s, x, labels, noise):
    high, low, total = math.log(max(COUNTS)), math.log(min(COUNTS)), 0.0
    for i, y in enumerate(labels):
        cosines = cosines_by_hand(s["weight"], x[:, i])
        for j in range(len(COUNTS)):
            cosines[j] -= 0.5 * abs(noise[i, j]) * (high - math.log(COUNTS[j])) / (high - low)
        cosines[y] -= 0.1
        surprise = minus_log_p([20 * c for c in cosines], y)
        total += (1 - math.exp(-surprise)) * surprise
    return total / len(labels)


def balanced_softmax_reference(s, x, labels, noise):
    total = 0.0
    for i, y in enumerate(labels):
        z = logits_by_hand(s["weight"], s["bias"], x[:, i])
        total += minus_log_p([v + math.log(n) for v, n in zip(z, COUNTS, strict=True)], y)
    return total / len(labels)


def lift_reference(s, x, labels, noise):
    total = 0.0
    for i, y in enumerate(labels):
        cosines = cosines_by_hand(s["weight"], x[:, i])
        total += minus_log_p([20 * c + math.log(n / sum(COUNTS)) for c, n in zip(cosines, COUNTS, strict=True)], y)
    return total / len(labels)


def reslt_reference(s, x, labels, noise):
    """Batch norm from the map's two moments, 4 classes: 1 of head, 2 of medium, 1 of tail; beta 0.5."""
    experts, batch = x.shape[:2]
    z = np.zeros((3, batch, len(COUNTS)))
    for h in range(3):
        for e in range(experts):
            mean = x[e, :, :, 0].mean(0)
            variance = x[e, :, :, 1].mean(0) - mean**2
            for i in range(batch):
                normal = (x[e, i, :, 0] - mean) / np.sqrt(variance + 1e-5) * s["norm_weight"][h] + s["norm_bias"][h]
                z[h, i] += (s["weight"][e] @ normal + s["bias"][e]) / experts
    fusion = sum(minus_log_p(list(z[:, i].sum(0)), y) for i, y in enumerate(labels)) / batch
    terms = []
    for i, y in enumerate(labels):
        for h, first in enumerate((0, 1, 3)):
            if y >= first:
                terms.append(-math.log(math.exp(-minus_log_p(list(z[h, i]), y)) + 1e-7))
    return 0.5 * fusion + 0.5 * sum(terms) / len(terms)


def probabilities(s, x):
    """(K,) of one sample x (E, D)."""
    z = logits_by_hand(s["weight"], s["bias"], x)
    return [math.exp(-minus_log_p(z, j)) for j in range(len(z))]


def focal_reference(s, x, labels, noise):
    p = [probabilities(s, x[:, i])[y] for i, y in enumerate(labels)]
    return sum(-((1 - q) ** 2) * math.log(q) for q in p) / len(p)


def class_balanced_reference(s, x, labels, noise):
    effective = [(1 - 0.9999**n) / (1 - 0.9999) for n in COUNTS]
    mean = sum(1 / e for e in effective) / len(effective)
    total = 0.0
    for i, y in enumerate(labels):
        total += minus_log_p(logits_by_hand(s["weight"], s["bias"], x[:, i]), y) / effective[y] / mean
    return total / len(labels)


def influence_balanced_reference(s, x, labels, noise):
    """The norm of the gradient of each sample's loss in the weights, by its formula, entry by entry."""
    experts, mean, total = len(x), sum(1 / n for n in COUNTS) / len(COUNTS), 0.0
    for i, y in enumerate(labels):
        p = probabilities(s, x[:, i])
        entries = [abs((p[j] - (j == y)) * v / experts) for j in range(len(p)) for e in range(experts) for v in x[e, i]]
        total += 1000 / COUNTS[y] / mean * -math.log(p[y]) / (sum(entries) + 1e-3)
    return total / len(labels)


def lade_reference(s, x, labels, noise):
    z = [logits_by_hand(s["weight"], s["bias"], x[:, i]) for i in range(len(labels))]
    prior = [n / sum(COUNTS) for n in COUNTS]
    term = 0.0
    for c, share in enumerate(prior):
        own = [z[i][c] for i, y in enumerate(labels) if y == c]
        q = math.log(sum(math.exp(v[c]) / share / len(prior) for v in z) / len(z))
        term -= share * ((sum(own) / len(own) if own else 0) - q - 0.01 * q**2)
    return balanced_softmax_reference(s, x, labels, noise) + 0.1 * term


def mixing_reference(shares):
    def reference(s, x, labels, noise):
        total = 0.0
        for i, y in enumerate(labels):
            j, t = int(noise[i, 0]), noise[i, 1]
            z = logits_by_hand(s["weight"], s["bias"], t * x[:, i] + (1 - t) * x[:, j])
            u = shares(t, COUNTS[y] / COUNTS[labels[j]])
            total += u * minus_log_p(z, y) + (1 - u) * minus_log_p(z, labels[j])
        return total / len(labels)

    return reference


def remix_share(t, ratio):
    if ratio >= 3 and t < 0.5:
        return 0
    return 1 if ratio <= 1 / 3 and 1 - t < 0.5 else t


REFERENCES = {
    "dr": ce_reference,
    "crt": ce_reference,
    "ride": ce_reference,
    "lws": lws_reference,
    "mislas": mislas_reference,
    "gcl": gcl_reference,
    "lift": lift_reference,
    "balanced_softmax": balanced_softmax_reference,
    "reslt": reslt_reference,
    "focal": focal_reference,
    "class_balanced": class_balanced_reference,
    "influence_balanced": influence_balanced_reference,
    "lade": lade_reference,
    "manifold_mixup": mixing_reference(lambda t, ratio: t),
    "remix": mixing_reference(remix_share),
    "smote": ce_reference,
    "feature_transfer": ce_reference,
}


# References of losses that depend on more: (state, batch of arrays, training features (E, N, D) sorted by class).


def isda_reference(s, batch, training):
    """Halfway through the training, so r = 0.25; the quadratic form entry by entry."""
    experts, total = len(training), 0.0
    starts = np.cumsum(COUNTS) - COUNTS
    for i, y in enumerate(batch.labels.tolist()):
        z = logits_by_hand(s["weight"], s["bias"], batch.features[:, i])
        for e in range(experts):
            own = training[e, starts[y] : starts[y] + COUNTS[y]]
            covariance = np.cov(own.T, bias=True)
            for k in range(len(z)):
                d = s["weight"][e, k] - s["weight"][e, y]
                form = sum(d[a] * covariance[a, b] * d[b] for a in range(len(d)) for b in range(len(d)))
                z[k] += 0.125 * float(form) / experts
        total += minus_log_p(z, y)
    return total / len(batch.labels)


def pair_mixup_reference(s, batch, training):
    total = 0.0
    for i, y in enumerate(batch.labels.tolist()):
        t = batch.noise[i]
        z = logits_by_hand(s["weight"], s["bias"], t * batch.features[:, i] + (1 - t) * batch.partners[:, i])
        total += t * minus_log_p(z, y) + (1 - t) * minus_log_p(z, batch.partner_labels[i])
    return total / len(batch.labels)


BATCH_REFERENCES = {"isda": isda_reference, "pair_mixup": pair_mixup_reference}
