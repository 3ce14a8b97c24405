"""The list of methods, each as it is written; see `wellcond.lab.methods.grammar`."""

from __future__ import annotations

LISTED: tuple[tuple[str, str], ...] = (
    ("SGDM = SGD(momentum=0.9, weight_decay=5e-4) + lrs=[0.03, 0.1, 0.3] + baseline=SGDM", "SGD with momentum 0.9"),
    ("SGDM+GC = SGDM + GradientCentralization", "SGDM with Gradient Centralization"),
    ("W-SGDM = SGDM + FeatureWhitening", "SGDM with feature whitening"),
    ("FSGD = SGDM + FeatureDescent", "SGDM with feature descent"),
    ("AdamW = AdamW(weight_decay=0.05) + lrs=[0.003, 0.01, 0.03] + baseline=AdamW", "Adam with decoupled weight decay"),
    ("AdamW+GC = AdamW + GradientCentralization", "AdamW with Gradient Centralization"),
    ("W-Adam = AdamW + FeatureWhitening", "AdamW with feature whitening"),
    ("FAdam = AdamW + FeatureDescent", "AdamW with feature descent"),
    (
        "W-SGDM+GC = SGDM + GradientCentralization + FeatureWhitening",
        "SGDM with Gradient Centralization, then feature whitening",
    ),
    (
        "FSGD+GC = SGDM + GradientCentralization + FeatureDescent",
        "SGDM with Gradient Centralization, then feature descent",
    ),
    ("W-SGDM-dense = SGDM + FeatureWhitening(second_moment='dense')", "W-SGDM with whole second moments"),
    ("W-SGDM-kron = SGDM + FeatureWhitening(second_moment='kronecker')", "W-SGDM with Kronecker factors of full rank"),
    ("W-SGDM-rank4 = SGDM + FeatureWhitening(rank=4)", "W-SGDM with factors of rank 4"),
    ("W-SGDM-bf16 = SGDM + FeatureWhitening(precision='bfloat16')", "W-SGDM with products in bfloat16"),
    ("FSGD-dense = SGDM + FeatureDescent(second_moment='dense')", "FSGD with whole second moments"),
    (
        "FSGD-decay-inside = SGD(momentum=0.9, weight_decay=0.0)"
        " + wellcond.lab.methods.gradient_decay:GradientDecay(weight_decay=1e-3)"
        " + FeatureDescent(second_moment='dense') + group(norms, biases, weight_decay=1e-3) + lrs=[0.03, 0.1, 0.3]"
        " + baseline=SGDM",
        "FSGD-dense with a decay of 0.001 that goes through the preconditioner",
    ),
    ("MBN = SGDM + norm=mbn", "SGDM with Momentum Batch Normalization"),
    (
        "MBN-derived = SGDM + norm=mbn(schedule.target='derived')",
        "MBN whose momentum ends at (32 - m) / (32 + m), m the batch, not at 1 - m / 32",
    ),
    ("BSR = SGDM + norm=bsr", "SGDM's training, inference by Batch Statistics Regression"),
    ("BSR-nnls = SGDM + norm=bsr(nonneg='nnls')", "BSR by exact non-negative least squares"),
    ("EvalNorm = SGDM + norm=evalnorm", "SGDM's training, inference by EvalNorm with learned weights"),
    (
        "EvalNorm-fixed = SGDM + norm=evalnorm(learn=False)",
        "SGDM's training, inference by EvalNorm with weights of 1 / batch size",
    ),
    (
        "EvalNorm-chosen = SGDM + norm=evalnorm(mixture=0.1)",
        "SGDM's training, inference with a tenth of the image's own statistics (example weighing)",
    ),
    ("BRN = SGDM + norm=brn", "SGDM with Batch Renormalization"),
    (
        "MABN = SGDM + norm=mabn(window=16) + lrs=[0.003, 0.01, 0.03]",
        "SGDM with Moving Average Batch Normalization of centralized weights: 16 batches' averages, also backward",
    ),
    ("CBN = SGDM + norm=cbn(window=8)", "SGDM with Cross-Iteration Batch Normalization over 8 batches"),
    ("PN = SGDM + norm=pn(momentum=0.01)", "SGDM with population normalization"),
    (
        "PN+gamma-decay = SGDM + norm=pn(momentum=0.01, gamma_decay=True)",
        "PN with the gamma decay that batch normalization's noise amounts to",
    ),
    ("GN = SGDM + norm=gn(num_groups=8)", "SGDM with group normalization (8 groups), which has no batch statistics"),
    ("SN = SGDM + norm=sn", "SGDM with Switchable Normalization"),
    (
        "SSN = SGDM + norm=ssn(shared_logits=True)",
        "SGDM with Sparse Switchable Normalization: each layer ends with IN, LN or BN alone",
    ),
    (
        "IBN = SGDM + norm=ibn",
        "SGDM with instance normalization of half of each layer's channels, batch normalization of the rest",
    ),
    ("KN = SGDM + norm=kn", "SGDM with Kalman Normalization, transitions and gains learned"),
    (
        "KN-fixed = SGDM + norm=kn(learned=False)",
        "SGDM with Kalman Normalization of constant gain, predictions pushed through the network",
    ),
    ("IterNorm = SGDM + norm=iternorm", "SGDM with batch whitening by Newton iterations"),
    ("DBN = SGDM + norm=dbn", "SGDM with decorrelated batch normalization: whitening by ZCA"),
    ("LN = SGDM + norm=ln", "SGDM with layer normalization, over all channels of an image"),
    ("IN = SGDM + norm=in", "SGDM with instance normalization, over each channel of an image"),
    ("ND = SGDM + layers=nd", "SGDM with network deconvolution in place of batch normalization"),
    (
        "WNN = SGDM + layers=wnn(stats_every=10, refresh_every=100) + lrs=[0.001, 0.003, 0.01]",
        "SGDM of layers that whiten their inputs (whitened networks)",
    ),
    (
        "GWNN = SGDM + layers=gwnn(stats_every=10, refresh_every=100) + lrs=[0.0003, 0.001, 0.003]",
        "SGDM of layers that whiten their outputs (generalized whitened networks)",
    ),
    (
        "EigenNet = SGDM + layers=eigen(stats_every=10, refresh_every=100) + lrs=[0.001, 0.003, 0.01]",
        "SGDM of layers that whiten their inputs and their outputs' gradients",
    ),
    ("SGDM+WN = SGDM + layers=wn(centred=False)", "SGDM with weight normalization: lengths and directions of weights"),
    ("SGDM+CWN = SGDM + layers=wn", "SGDM with centred weight normalization"),
    ("SGDM+WS = SGDM + layers=ws", "SGDM with weight standardization of convolutions"),
    (
        "SGDM+WS+GC = SGDM + GradientCentralization + layers=ws",
        "SGDM with weight standardization and Gradient Centralization",
    ),
    (
        "IBN-a = SGDM + layers=ibn-a",
        "SGDM with instance normalization of half the channels early in the blocks of a residual net",
    ),
    ("IBN-b = SGDM + layers=ibn-b", "SGDM with instance normalization after the first stages of a residual net"),
    (
        "GN+GC-conv = SGDM + GradientCentralization(layers='conv') + norm=gn(num_groups=8)",
        "GN with Gradient Centralization of convolutions alone",
    ),
    (
        "SGDM+GC-conv = SGDM + GradientCentralization(layers='conv')",
        "SGDM with Gradient Centralization of convolutions alone",
    ),
    (
        "SGDW = SGDW(momentum=0.9, weight_decay=5e-4) + lrs=[0.03, 0.1, 0.3] + baseline=SGDW",
        "SGD with momentum 0.9 and decoupled weight decay",
    ),
    ("SGDW+GC = SGDW + GradientCentralization", "SGDW with Gradient Centralization"),
    (
        "DW-SGDM = SGDW(momentum=0.9, weight_decay=0.1) + FeatureWhitening(norm='fixed', outputs=True)"
        " + lrs=[0.006, 0.02, 0.06] + baseline=SGDM",
        "both sides whitened, in a fixed norm, with decoupled weight decay (wellcond.optim.DWSGDM)",
    ),
    (
        "Adam = Adam(weight_decay=5e-4) + lrs=[0.001, 0.003, 0.01] + baseline=Adam",
        "Adam with weight decay in the gradient",
    ),
    ("Adam+GC = Adam + GradientCentralization", "Adam with Gradient Centralization"),
    ("Adam+W = Adam + FeatureWhitening", "Adam with feature whitening"),
    (
        "Adagrad = Adagrad(weight_decay=5e-4) + lrs=[0.003, 0.01, 0.03] + baseline=Adagrad",
        "Adagrad with weight decay in the gradient",
    ),
    ("Adagrad+GC = Adagrad + GradientCentralization", "Adagrad with Gradient Centralization"),
    ("RAdam = RAdam(weight_decay=5e-4) + lrs=[0.001, 0.003, 0.01] + baseline=RAdam", "Adam with a rectified step size"),
    (
        "RMSprop = RMSprop(momentum=0.9, weight_decay=5e-4) + lrs=[0.0001, 0.0003, 0.001] + baseline=RMSprop",
        "RMSprop with momentum 0.9",
    ),
    (
        "Adadelta = Adadelta(weight_decay=5e-4) + lrs=[0.3, 1, 3] + baseline=Adadelta",
        "Adadelta with weight decay in the gradient",
    ),
    (
        "AdaBelief = AdaBelief(weight_decay=0.05) + lrs=[0.001, 0.003, 0.01] + baseline=AdaBelief",
        "steps by how far gradients are from their mean",
    ),
    (
        "AdaHessian = AdaHessian(weight_decay=5e-4) + lrs=[0.03, 0.1, 0.3] + baseline=AdaHessian",
        "steps by an estimate of the Hessian's diagonal",
    ),
    # Apollo's own warm-up would hold the lr against the schedule; --warmup is there for every method.
    (
        "Apollo = ApolloDQN(warmup_steps=0, weight_decay=5e-4) + lrs=[0.003, 0.01, 0.03] + baseline=Apollo",
        "a diagonal quasi-Newton method, Apollo",
    ),
    (
        "Ranger = Ranger(use_gc=False, weight_decay=0.05) + lrs=[0.001, 0.003, 0.01] + baseline=Ranger",
        "RAdam with slow weights; its own Gradient Centralization is off",
    ),
    (
        "Lookahead = Lookahead(momentum=0.9, weight_decay=5e-4) + lrs=[0.03, 0.1, 0.3] + baseline=SGDM",
        "SGDM with slow weights: 5 steps ahead, half of the way kept",
    ),
    (
        "Muon = Muon(weight_decay=0.05, adamw_lr=0.01, adamw_wd=0.05) + lrs=[0.005, 0.015, 0.05] + baseline=Muon",
        "orthogonal updates of hidden weights, AdamW for the rest",
    ),
    (
        "Lion = Lion(weight_decay=0.2) + lrs=[0.001, 0.003, 0.01] + baseline=AdamW",
        "signs of a momentum, with decoupled weight decay",
    ),
    (
        "ScheduleFree = ScheduleFreeAdamW(weight_decay=0.05) + lrs=[0.003, 0.01, 0.03] + schedule='constant'"
        " + baseline=AdamW",
        "AdamW of averaged weights, which needs no schedule",
    ),
    (
        "SOAP = SOAP(weight_decay=0.05) + lrs=[0.01, 0.03, 0.1] + baseline=AdamW",
        "Adam in the eigenbasis of Shampoo's preconditioner",
    ),
    # As often as pays on short runs; its own defaults, 25 and 1000, are for long ones.
    (
        "Shampoo = ScalableShampoo(weight_decay=5e-4, start_preconditioning_step=10, preconditioning_compute_steps=10)"
        " + lrs=[0.03, 0.1, 0.3] + baseline=SGDM",
        "Kronecker-factored preconditioner of gradients, steps as long as SGD's",
    ),
    # What balances its factors would draw from numpy's generator, which a seed of the lab does not set.
    (
        "PSGD = Kron(weight_decay=0.05, balance_prob=0.0) + lrs=[0.003, 0.01, 0.03] + baseline=AdamW",
        "preconditioner with Kronecker factors, fitted to gradients step by step",
    ),
    (
        "SAM = SAM(rho=0.05, momentum=0.9, weight_decay=5e-4) + lrs=[0.03, 0.1, 0.3] + baseline=SGDM",
        "SGDM with the gradient at the worst place nearby, for two gradients a step",
    ),
    (
        "LBFGS = LBFGS(max_iter=4, history_size=10, line_search_fn='strong_wolfe') + lrs=[0.1, 0.3, 1.0]",
        "quasi-Newton steps with a line search, for small tasks and large batches",
    ),
)
"""Each method and what it is, in the order in which reports list them; later ones may build on earlier ones."""
