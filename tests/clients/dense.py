"""Log-probabilities of a dense forward: JSON lists of token ids on standard input, for each a list of [log-probability of the
token, whether it is the most likely one], from the second token on, on standard output."""

import json
import sys

import jax
import numpy as np

from jaxkv.runtime.startup import make_mesh
from jaxkv.runtime.weights import load_model
from tests.oracle import DenseOracle

model = load_model(None, make_mesh(1), dtype="float32")
oracle = DenseOracle(model.spec, model.params)
answers = []
for tokens in json.load(sys.stdin):
    logprobs = np.asarray(jax.nn.log_softmax(oracle.logits(tokens)[:-1].astype(np.float32)))
    answers.append([[float(row[token]), bool(row.argmax() == token)] for row, token in zip(logprobs, tokens[1:])])
json.dump(answers, sys.stdout)
