"""Slow references of the losses of hosts and objectives in float64, one number at a time, from the papers' formulas.

Reference(state, features (E, B, D), labels, noise) -> loss, for the class counts `COUNTS` of the conformance checks.
"""

import math

import numpy as np
import torch
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


def mean_loss(s, x, labels, loss):
    """The mean over the batch of loss(logits, label)."""
    return sum(loss(logits_by_hand(s["weight"], s["bias"], x[:, i]), y) for i, y in enumerate(labels)) / len(labels)


def ce_reference(s, x, labels, noise):
    return mean_loss(s, x, labels, minus_log_p)


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
    def adjusted(z, y):
        return minus_log_p([v + math.log(n) for v, n in zip(z, COUNTS, strict=True)], y)

    return mean_loss(s, x, labels, adjusted)


def lift_reference(s, x, labels, noise):
    total = 0.0
    for i, y in enumerate(labels):
        cosines = cosines_by_hand(s["weight"], x[:, i])
        total += minus_log_p([20 * c + math.log(n / sum(COUNTS)) for c, n in zip(cosines, COUNTS, strict=True)], y)
    return total / len(labels)


def reslt_reference(s, x, labels, noise, beta=0.5):
    """Batch norm from the map's two moments, 4 classes: 1 of head, 2 of medium, 1 of tail."""
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
    return (1 - beta) * fusion + beta * sum(terms) / len(terms)


def probabilities(s, x):
    """(K,) of one sample x (E, D)."""
    z = logits_by_hand(s["weight"], s["bias"], x)
    return [math.exp(-minus_log_p(z, j)) for j in range(len(z))]


def focal_by_hand(z, y, gamma, form):
    """One sample's focal loss; with a sigmoid it is the sum of a binary loss for each class."""
    if form == "softmax":
        p = math.exp(-minus_log_p(z, y))
        return -((1 - p) ** gamma) * math.log(p)
    right = [1 / (1 + math.exp(-v if j == y else v)) for j, v in enumerate(z)]
    return sum(-((1 - p) ** gamma) * math.log(p) for p in right)


def focal_reference(s, x, labels, noise, gamma=2, form="softmax"):
    return mean_loss(s, x, labels, lambda z, y: focal_by_hand(z, y, gamma, form))


def weights_by_hand(beta=0.9999):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [len(COUNTS) * r / sum(raw) for r in raw]


def class_balanced_reference(s, x, labels, noise, beta=0.9999, base="softmax", gamma=2):
    weights, gamma = weights_by_hand(beta), 0 if base == "softmax" else gamma
    form = "sigmoid" if base == "sigmoid_focal" else "softmax"
    return mean_loss(s, x, labels, lambda z, y: weights[y] * focal_by_hand(z, y, gamma, form))


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


def squares_by_hand(x, centroids):
    return [sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in centroids]


def oltr_reference(s, x, labels, noise):
    experts, batch = x.shape[:2]
    z, term = np.zeros((batch, len(COUNTS))), 0.0
    for e in range(experts):
        c, w = s["centroids"][e], s["weight"][e]
        attract, others = 0.0, 0.0
        for i, y in enumerate(labels):
            h = x[e, i]
            m = np.exp(s["memory_weight"][e] @ h + s["memory_bias"][e])
            memory = (m / m.sum()) @ c
            v = h + np.tanh(s["select_weight"][e] @ h + s["select_bias"][e]) * memory
            squares = squares_by_hand(h, c)
            v = 10 / math.sqrt(min(squares)) * v
            length = math.sqrt(sum(v**2))
            for k in range(len(w)):
                cosine = sum(v * w[k]) / length / math.sqrt(sum(w[k] ** 2))
                z[i, k] += 16 * length / (1 + length) * cosine / experts
            attract += squares[y] / (2 * batch)
            others += (sum(squares) - squares[y]) / (batch * len(w))
        term += (attract + 0.01 * max(0, 10 - others)) / experts
    return sum(minus_log_p(list(z[i]), y) for i, y in enumerate(labels)) / batch + 0.01 * term


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
    "cam_split": ce_reference,
    "oltr": oltr_reference,
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


def m2m_reference(s, batch, training):
    """The stage-I classifier is the one at the start, so both are in `s`."""
    x, labels, noise = batch.features, batch.labels.tolist(), batch.noise
    experts, size = x.shape[:2]
    length = np.sqrt((training**2).sum((0, 2))).mean()
    total = 0.0
    for i, k in enumerate(labels):
        odds = [1 - 0.999 ** max(COUNTS[y] - COUNTS[k], 0) for y in labels]
        own = x[:, i]
        if sum(odds) and noise[i, 0] < 1 - COUNTS[k] / max(COUNTS):
            seed = next(j for j in range(size) if sum(odds[: j + 1]) > noise[i, 1] * sum(odds))
            moved = x[:, seed].copy()
            for _ in range(10):
                p = np.array(probabilities(s, moved))
                p[k] -= 1
                g = np.array(
                    [(p @ s["weight"][e] + 0.5 * s["weight"][e, labels[seed]]) / experts for e in range(experts)]
                )
                moved = np.maximum(moved - 0.1 * length * g / (np.sqrt((g**2).sum()) + 1e-10), 0)
            if probabilities(s, moved)[k] >= 0.9 and noise[i, 2] < odds[seed]:
                own = moved
        total += minus_log_p(logits_by_hand(s["weight"], s["bias"], own), k)
    return total / size


def meta_saug_reference(s, batch, training):
    """Gradients by torch's autograd, of formulas written out sample by sample; halfway, so r = 0.125."""
    starts = np.cumsum(COUNTS) - COUNTS
    parts = [training[:, a : a + n] for a, n in zip(starts, COUNTS, strict=True)]
    spreads = torch.from_numpy(np.stack([part.var(1) for part in parts], 1)).requires_grad_()
    effective = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS], dtype=torch.float64)
    weights = effective / effective.mean()
    x, partners = torch.from_numpy(batch.features), torch.from_numpy(batch.partners)

    def logits(w, b, features):
        return sum(features[e] @ w[e].T + b[e] for e in range(len(w))) / len(w)

    def augmented(w, b, covariances):
        losses = []
        for i, y in enumerate(batch.labels.tolist()):
            forms = sum(((w[e] - w[e, y]) ** 2 * covariances[e, y]).sum(1) for e in range(len(w))) / len(w)
            z = logits(w, b, x[:, i : i + 1])[0] + 0.0625 * forms
            losses.append(weights[y] * (z.logsumexp(0) - z[y]))
        return sum(losses) / len(losses)

    w, b = (torch.from_numpy(s[name]).requires_grad_() for name in ("weight", "bias"))
    steps = torch.autograd.grad(augmented(w, b, spreads), (w, b), create_graph=True)
    z = logits(w - 0.02 * steps[0], b - 0.02 * steps[1], partners)
    on_balanced = (z.logsumexp(1) - z[torch.arange(len(z)), torch.from_numpy(batch.partner_labels)]).mean()
    (direction,) = torch.autograd.grad(on_balanced, spreads)
    assert direction.abs().max() > 0
    return augmented(w, b, spreads - 0.1 * direction).item()


BATCH_REFERENCES = {
    "isda": isda_reference,
    "pair_mixup": pair_mixup_reference,
    "m2m": m2m_reference,
    "meta_saug": meta_saug_reference,
}
