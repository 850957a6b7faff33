"""Fits a model with the interpreter and the libraries that run this script, and writes results.

Usage: python fit_model.py OUTPUT_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split


def main(output: Path) -> None:
    """Fit on generated data; write the predictions as Parquet and a summary as JSON."""
    features, labels = make_classification(n_samples=4000, n_features=24, random_state=7)
    train_x, test_x, train_y, test_y = train_test_split(features, labels, random_state=7)
    model = RandomForestClassifier(n_estimators=60, random_state=7).fit(train_x, train_y)
    predicted = model.predict(test_x)
    table = pd.DataFrame(test_x).rename(columns="feature_{}".format)
    table["label"], table["predicted"] = test_y, predicted
    pq.write_table(pa.Table.from_pandas(table), output / "predictions.parquet")
    read_back = pq.read_table(output / "predictions.parquet").to_pandas()
    summary = {
        "prefix": sys.prefix,
        "loaded_from": [module.__file__ for module in (np, pd, pa, sklearn)],
        "rows": len(read_back),
        "accuracy": round(float(np.mean(read_back["label"] == read_back["predicted"])), 4),
    }
    (output / "result.json").write_text(json.dumps(summary, indent=2))


main(Path(sys.argv[1]))
