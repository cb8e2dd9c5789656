"""Words of plans for timesteps, experts, merging and its weights: concept -> its names."""

from __future__ import annotations

MERGING: dict[str, str] = {
    "time": "timestep, t step, diffusion step, denoising step, noising step, noise level, noise scale, noise "
    "intensity, diffusion time, time, temporal, step wise, noise regime, denoising stage, noise stage, timestep "
    "space, time axis, trajectory, diffusion trajectory, denoising trajectory, generative trajectory, noise "
    "magnitude, noise strength, timeline, timestep index, corruption level, t, level of noise, noising level, "
    "diffusion timestep, denoising timestep",
    "range": "range, interval, subset, segment, chunk, bucket, subrange, subinterval, window, band, region, slice, "
    "zone, section, portion, stretch, span, bin, piece, regime, sub range, time range, sector, partition cell",
    "split": "division, divide, dividing, grouping, group, partition, repartition, split, splitting, segmentation, "
    "segmenting, binning, discretization, stratification, subdivision, subdivide, partitioning, carve, carve up, "
    "slice up, cut up, chop, tile, tiling, bucketing, break up, broken into, breaking, separated into, cutting, "
    "parcel, arrangement of range, cut into, binned",
    "boundary": "boundary, edge, cut point, cut position, cutting point, cutting position, split position, cutoff, "
    "breakpoint, cut, border, split point, cut off, threshold, demarcation, delimiter, transition point, limit of "
    "range, cutpoint, end point, interval limit",
    "overlap": "overlapping, overlap, sliding window, intersecting, nondisjoint, overlapped, extend by, extend into, "
    "extended into neighbor, reach into, widen by, enlarge by, shared timestep, spill into, extending by, overlaps "
    "with neighbor, shared margin, extends beyond, expand by, expand into, overlapping neighbor, share timestep, "
    "segment share, range share, interval share, neighbors share, neighbor share, share of their timestep, shared "
    "between neighbor, common timestep",
    "cluster": "cluster, clustering, k means, kmeans",
    "uniform": "uniform, equal, equally, even, evenly, equidistant, equal width, uniformly, equal size, same size, "
    "equal length, equally sized, equally spaced, evenly spaced, evenly sized, identical, even split, equally long, "
    "same length, equal sized, same width, identical width, equilength, equally wide, even distribution",
    "nonuniform": "nonuniform, uneven, unequal, unevenly, variable width, varying width, variable size, nonequal, "
    "nonuniformly, unequally, irregular, heterogeneous, different width, different size, varying size, variable "
    "length, asymmetric, imbalanced, inhomogeneous, unequal length, unequal width, unequally spaced, unevenly sized, "
    "unequal size, unequally sized",
    "random": "random, randomly, arbitrary, randomized, at random, shuffled, shuffling, arbitrarily, randomness, "
    "haphazard, by chance, randomly chosen, random chance",
    "assign": "assignment, assign, permutation, noncontiguous, scattered, noncontiguously, allocate, individual "
    "timestep, allocation, noncontinuous, noncontiguity, scatter, handed out, dispersed",
    "adaptive": "adaptive, dynamic, data driven, learned boundary, adaptively, automatic, automatically, "
    "automatically determined, data dependent, data driven boundary",
    "logarithmic": "logarithmic, log spaced, exponential, geometric, quadratic, logarithmically",
    "finer": "finer, denser, coarser, more fine grained, smaller range, larger range, narrower, wider, skewed, "
    "biased, concentrated, more frequent",
    "gradient": "gradient, gradient conflict, gradient similarity, cosine similarity, gradient cosine, conflict, "
    "gradient interference, task affinity, task similarity, interference, gradient alignment, affinity, heatmap, "
    "similarity matrix, similarity heatmap, gradient similarity matrix, affinity matrix, conflicting gradient, "
    "gradient based clustering, conflict between timestep, gradient agreement, gradient statistic, gradient "
    "direction, gradient correlation, task conflict",
    "contiguous": "contiguous, nonoverlapping, disjoint, mutually exclusive, consecutive",
    "snr": "snr, signal to noise ratio, signal to noise, log snr, logsnr",
    "expert": "expert, specialist, specialized model, finetuned model, decoupled model, separate model, individual "
    "model, multiple model, submodel, branch, timestep specific model, range specific model, multimodel, specific "
    "model, several model, task specific model, finetuned network, specialized network, separate network, "
    "independent model, copy, finetuned copy, subnetwork, net, nets, per range network, per range model, per "
    "interval model, member, decoupled network, individual network, child model, finetuned denoiser, thetai, per "
    "segment model, finetuned net, specialised network, specialised denoiser, specialized denoiser, range denoiser, "
    "sub network, expert network, expert model, task specific network, dedicated model, dedicated network, finetuned "
    "checkpoint, finetuned weight, finetuned parameter, several network, several denoiser, finetuned nets, one "
    "expert per, one model per, one network per, one expert for each, one model for each, one network for each, one "
    "denoiser per, one specialist per",
    "number": "number, count, amount, quantity, granularity, how many, num, cardinality, total number, few, more, "
    "fewer, how finely",
    "nsymbol": "n",
    "single": "single, one model, single model, unified model, monolithic, joint, jointly, joint training, one "
    "network, single network, all in one, shared model, standard finetuning, vanilla finetuning, conventional "
    "finetuning, traditional finetuning, full finetuning, naive finetuning, standard training, regular finetuning, "
    "one single model, conventional training, vanilla training, traditional training, unified training, single "
    "diffusion model, joint model, direct finetuning, plain finetuning, all timestep model, unified finetuning, one "
    "net, one denoiser, single denoiser, single net, one shared model, one shared network, shared network, "
    "generalist, generalist model, one set of parameter, single set of parameter, single set of weight, one set of "
    "weight, monolith, one and same model, one common model, one big model, only one model, just one model, one "
    "checkpoint, single checkpoint, unsplit, undivided, ordinary finetuning, usual finetuning, common model, one "
    "expert, one single expert, single expert, one finetuned model",
    "decouple": "decouple, decoupled, decoupling, decoupled training, decoupled finetuning, disentangle, separately, "
    "separate training, separate finetuning, independent training, independent finetuning, specialization, "
    "independently, range specific, timestep specific, range wise, isolated training, decouple then merge, branch "
    "out, branching out, specialize, specializing, specialised, split up the training, divide and conquer, separated "
    "training, separate optimization, decoupled optimization, individually, individual training, individual "
    "finetuning, independently finetuned, separately finetuned, separately trained, disentangling, expert training, "
    "expert finetuning, expert specialization",
    "finetuning": "finetuning, finetune, finetuned",
    "training": "training, train, trained, learning",
    "merge": "merge, merging, merger, fusion, fuse, combine, combination, combining, aggregate, aggregation, "
    "consolidate, consolidation, unify, unification, recombine, recombination, blending, blend, merged model, "
    "integration, integrate, single merged model, merged single model, merge into single model, parameter fusion, "
    "weight merging, parameter merging, amalgamation, weight fusion, collapse, collapsing, condense, weld, unite, "
    "unified, unifying, back into one, back to one, meld, melding, reassemble, reunite, fold together, put together, "
    "combined, assemble, weight space combination, pool into, distil into one set, reunification, back together, "
    "into one model, into one network, into one net, coalesce, join, joining, joined, fused, fusing, fuses, unified "
    "model, merged, bring together, bringing together, brought together",
    "taskvector": "task vector, delta weight, weight delta, parameter delta, weight difference, task arithmetic "
    "vector, difference vector, vector of difference, update vector, delta, weight change, weight update, parameter "
    "difference, parameter change, parameter update, finetuning delta, finetuning update, parameter offset, weight "
    "offset, difference of weight, difference to pretrained weight, expert delta, delta vector, offset from "
    "pretrained, taskvec",
    "taskarithmetic": "task arithmetic, linear merging, linear combination of task vectors, task vector addition, "
    "task vector arithmetic, task vector summation, weighted sum, linear combination, weighted sum of task vectors, "
    "task vector sum, sum wsymbol taskvec, sum taskvec, sum of wsymbol taskvec, arithmetic in weight space, adding "
    "task vector, addition of task vector, weighted addition, linear task vector combination",
    "average": "averaging, average, mean, model soup, weight averaging, parameter averaging, simple averaging, soup, "
    "uniform averaging, model averaging, arithmetic mean, naive averaging, uniform soup, parameter mean, mean of "
    "weights, linear averaging, averaged, simple average, arithmetic average, fedavg, plain averaging, simple weight "
    "averaging, midpoint, mean of parameter, averaged weight, averaging parameter, average parameter, equal weight "
    "average, equally weighted average, uniformly averaged, parameter average, weight average, model average, "
    "averaging of weight, arithmetic averaging",
    "weightedaverage": "weighted average, weighted averaging, weighted mean, weighted combination, convex "
    "combination, weighted averages, weighted interpolation",
    "ties": "ties, ties merging, trim elect sign merge, trim elect sign and merge, trim elect merge, sign election, "
    "trim elect sign disjoint merge, ties merge, elect sign, sign consensus, majority sign, trim and elect, sign "
    "conflict resolution, sign resolution, resolving sign",
    "dare": "dare, drop and rescale, dare merging, drop rescale, random dropping, dare linear, randomly dropping "
    "delta, drop entries and rescale, random drop and rescale",
    "dareties": "dare ties, ties dare, dare with ties, dare and ties combined",
    "breadcrumbs": "breadcrumb, model breadcrumb, outlier removal, breadcrumbs merging",
    "della": "della, magprune, della merging, magnitude sampling",
    "slerp": "slerp, spherical linear interpolation, spherical interpolation, spherical, spherical interpolate, on "
    "the sphere, great circle",
    "fisher": "fisher, fisher information, fisher weighted, fisher merging, fisher weighted averaging, fisher "
    "information matrix, fisher averaging, fisher weighted merging, fisher weighting, empirical fisher, diagonal "
    "fisher",
    "tsv": "tsv, task singular vector, tsv merge, singular vector, tsvm, task singular vector merging",
    "isoc": "isoc, isotropic merging, isotropic, isotropic model merging, iso",
    "wudi": "wudi, wudi merging, interference minimization, wudi merge",
    "othermerge": "regmean, adamerging, zipit, git rebasin, rebasin, emr merging, pcb merging, lorahub, optimal "
    "transport, permutation alignment, otfusion, neuron alignment, consensus merging, model stock, twin merging, "
    "stitching, parameter selection, selective merging, gradual merging, max pooling, weight pruning, pruning, low "
    "rank merging, nonlinear merging, nonlinear combination, attention based merging, knowledge amalgamation",
    "ensemble": "ensemble, ensembling, routing, route, mixture of experts, moe, switching, switch, timestep wise "
    "ensemble, timestep dependent selection, expert selection, no merge, unmerged, nomerge, per range model, output "
    "averaging, keep separate, model switching, serve separately, keep separately, used separately, before merge, "
    "hand off, handed off, handing over, hand over, no fusion, swap expert, swapping expert, left unmerged, unfused, "
    "kept separate, keep all expert, keep expert, timestep router, hard router, oracle router, hard routing, hard "
    "switching, n separate expert, piecewise model, model bank, bank of expert, expert bank, dispatch, dispatching, "
    "each expert serves, without merging, without fusing, without fusion",
    "interpolation": "interpolation, interpolate, linear interpolation, lerp, interpolating",
    "weight": "weight, coefficient, scaling factor, scalar, scaling coefficient, scaling, weighting, ratio, "
    "proportion, lambda coefficient, weighting coefficient, factor, multiplier, strength, magnitude, scale, blending "
    "factor, importance, mixing weight, mixing coefficient, scaling constant, trade off weight, balancing weight, "
    "prefactor",
    "lambda": "lambda, lam",
    "search": "search, searching, selection, determination, search strategy, search method, tune, tuning, "
    "hyperparameter search, optimization, optimal, find, optimizing, select, selected, selecting, choosing, chosen, "
    "determine, determined, determining, optimised, optimized, found by, searched, picking, picked, tuned, sweep",
    "grid": "grid, grid search, exhaustive search, brute force, grid searching, exhaustive, exhaustively, lattice "
    "search",
    "leastsquares": "least square, closed form, analytic, analytical, normal equation, closed form solution, linear "
    "regression, ridge regression, regression, closed form least square, linear least square, analytically, solve a "
    "linear system, linear system, quadratic form",
    "learned": "learned, learnable, gradient descent, gradient based, backpropagation, trainable, gradient based "
    "optimization, differentiable, end to end, test time adaptation, stochastic gradient descent, gradient "
    "optimized, gradient descent optimization, learning based, learn, optimized by gradient, optimised by gradient, "
    "gradient optimization, by backpropagation, sgd optimized, trainable parameter, optimized by gradient descent, "
    "optimised by gradient descent, by gradient descent, via gradient descent, through gradient descent, trained by "
    "gradient descent, with gradient descent, learning weight",
    "cmaes": "cma es, cmaes, evolutionary, evolution strategy, evolutionary search, genetic, genetic algorithm, "
    "evolutionary algorithm, evolution, covariance matrix adaptation, evolutionary optimization, evolve, evolved, "
    "genetic search, evolutionary method, evolutionary strategy",
    "tpe": "tpe, bayesian, bayesian optimization, optuna, parzen, hyperopt, gaussian process, bayesian search, tree "
    "structured parzen estimator, tree structured parzen, surrogate model, bayes, bayesian optimizer",
    "randomsearch": "random search, simulated annealing, particle swarm, hill climbing, coordinate descent, greedy, "
    "greedy search, greedy soup",
    "layerwise": "layer wise, per layer, layerwise, layer specific, each layer, layer level, layer by layer, "
    "individual layer, every layer, layer dependent, per layer weight, layers individually, layer granularity, for "
    "each layer, for every layer, separate layer, layer its own",
    "blockwise": "block wise, per block, blockwise, module wise, block level, block specific, block by block, "
    "individual block, block dependent, module level, block granularity, blocks individually, per module, every "
    "module",
}
