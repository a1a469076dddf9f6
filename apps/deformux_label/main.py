"""The app that MONAI Label loads: wiring only. It is executed by path, so nothing here may be imported or pickled."""

import logging
import os
from pathlib import Path
from typing import Any

import requests
from fastapi import HTTPException
from lib.api import install, private_uploads
from lib.checks import find_image, inference_options, known
from lib.configs.project import InvalidOption, Project
from lib.datastore import CheckedDatastore
from lib.infers.segmentation import UNTRAINED, Segmentation
from lib.models import ServedModels
from lib.scoring.dice import DiceScoring
from lib.scoring.uncertainty import UncertaintyScores, UncertaintyScoring
from lib.start import refuse_to_start
from lib.strategies.choose import Random, Uncertainty
from lib.trainers.finetune import FineTune
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First

logger = logging.getLogger(__name__)


class DeformUXLabel(MONAILabelApp):
    """One-click segmentation with DeformUX-Net that learns from submitted labels."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        try:
            self.project = Project.from_conf(conf)
        except InvalidOption as error:
            refuse_to_start(str(error))
        self.state_folder = self.project.state_folder(app_dir, studies)
        self.models = ServedModels(self.project, self.state_folder)
        self.scores = UncertaintyScores(self.models, self.state_folder / "uncertainty")
        self.dice = DiceScoring(self.project)
        self.uploads: Path | None = None
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf={},
            name="DeformUX Label",
            description="One-click segmentation with DeformUX-Net that learns from submitted labels",
            version="0.1.0",
            labels=list(self.project.labels),
        )
        # It would start a Python process at every Next Sample; scores are updated where they change instead.
        self._auto_update_scoring = False
        logger.info("Project %s: %s", self.state_folder.name, self.project.to_conf())

    def init_datastore(self) -> Datastore:
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        try:
            return CheckedDatastore(self.studies, labels=self.project.labels)
        except ValueError as error:
            refuse_to_start(f"{self.studies}/datastore_v2.json is damaged; move it away and start again ({error})")

    def init_infers(self) -> dict[str, InferTask]:
        return {"segmentation": Segmentation(self.project, self.models)}

    def init_trainers(self) -> dict[str, TrainTask]:
        return {"segmentation": FineTune(self.project, self.models, self.state_folder)}

    def init_strategies(self) -> dict[str, Strategy]:
        return {"random": Random(), "first": First(), "uncertainty": Uncertainty(self.scores)}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        return {"dice": self.dice, "uncertainty": UncertaintyScoring(self.scores)}

    def on_init_complete(self) -> None:
        # Called in the server alone, when it is ready to answer.
        from monailabel.app import app as server

        # Waiting threads of a training would otherwise spin on the processors that a segmentation needs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.uploads = private_uploads()
        install(server, self.check_training)
        super().on_init_complete()

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        datastore = datastore or self.datastore()
        model = request.get("model")
        task = known("model", model, self._infers)
        options = inference_options(request)
        folders = [Path(self.studies), Path(self.sessions().store_path) if self.sessions() is not None else None]
        image_id, path = find_image(request.get("image"), datastore, [f for f in (*folders, self.uploads) if f])
        if options["save_label"] and self.models.current() is None:
            raise HTTPException(409, UNTRAINED)
        file, params = task({"model": model, "description": task.description, "image": path, **options})
        label = file
        if options["save_label"] and image_id is not None:
            label = datastore.save_label(image_id, file, options["label_tag"], {"model": model, "params": params})
        return {"label": label, "tag": DefaultLabelTag.ORIGINAL, "file": file, "params": params}

    def infer_wsi(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        raise HTTPException(404, "this server segments volumes, not whole-slide images")

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        known("strategy", request.get("strategy"), self._strategies)
        return super().next_sample(request)

    def check_training(self, model: str | None, options: dict[str, Any]) -> None:
        """Refuse a training that cannot work, before a process is started for it."""
        if model is not None:
            known("model to train", model, self._trainers)
        for name, trainer in self._trainers.items():
            if model in (None, name):
                trainer.check(options if model else options.get(name) or {}, self.datastore())

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        trainer = known("model to train", request.get("model"), self._trainers)
        if self._server_mode:
            return trainer(request, self.datastore())
        os.nice(5)  # whoever waits for the server comes first
        try:
            result = trainer(request, self.datastore())
        except HTTPException as error:
            raise SystemExit(f"The training failed: {error.detail}") from None
        try:
            self.async_scoring("uncertainty")
        except requests.RequestException as error:
            # A server that is bound to another address; volumes are then scored when they are asked for.
            logger.warning("The server could not be asked to score the unlabelled volumes: %s", error)
        return result

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        known("scoring method", request.get("method"), self._scoring_methods)
        if not self._server_mode:
            os.nice(10)
        return super().scoring(request, datastore)

    def on_save_label(self, image_id: str, label_id: str) -> None:
        super().on_save_label(image_id, label_id)
        self.dice.score(self.datastore(), image_id)

    def bundle_path(self, model: str | None) -> None:
        # MONAI Label asks for it before every background task, which makes it the place to refuse an unknown model.
        if model is not None:
            known("model", model, self._infers | self._trainers)

    def model_file(self, model: str, validate: bool = True) -> str:
        # Its endpoints overwrite and delete the file in place, under the requests that it is serving.
        raise HTTPException(405, "model versions are written by training alone and are not exchanged over HTTP")
