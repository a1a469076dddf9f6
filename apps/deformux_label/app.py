"""The app that MONAI Label loads through ``main.py``; it only connects its parts."""

import dataclasses
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.async_tasks.utils import processes

from deformux import __version__
from deformux.data.header import MAX_VOXELS_VARIABLE
from deformux.publishing.model_versions import ModelVersions
from deformux.publishing.project_plan import ProjectPlanner
from deformux_label.lib.activelearning.background_scores import SelectionScores, SelectionScoring
from deformux_label.lib.activelearning.strategies import all_strategies
from deformux_label.lib.activelearning.waiting_volumes import WaitingVolumes
from deformux_label.lib.background.server_lifetime import end_background_with_this_server, end_with_the_parent
from deformux_label.lib.configs.project import InvalidOption, Project
from deformux_label.lib.configs.refuse_to_start import refuse_to_start
from deformux_label.lib.configs.server import SERVER_OPTIONS, ServerOptions
from deformux_label.lib.infers.batch_inference import BatchInferences, images_of, run_batch
from deformux_label.lib.infers.click_cache import ClickCache
from deformux_label.lib.infers.edit import Edit
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.proposals import Proposals
from deformux_label.lib.infers.scribbles import all_scribble_tasks
from deformux_label.lib.infers.segmentation import Segmentation
from deformux_label.lib.infers.served_network import UNTRAINED
from deformux_label.lib.infers.uncertainty_map import store_uncertainty
from deformux_label.lib.requests.caller import Caller, calling, note, require, with_login
from deformux_label.lib.requests.clicks import BACKGROUND_LABEL
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, find_scan
from deformux_label.lib.requests.options import checked_device, known
from deformux_label.lib.requests.uploads import own_folder, private_uploads
from deformux_label.lib.scoring.dice import DiceScoring
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.datastore import CheckedDatastore, StudiesError
from deformux_label.lib.store.label_fields import UNCERTAINTY_TAG
from deformux_label.lib.store.leases import Leases
from deformux_label.lib.store.volume_sessions import VolumeSessions
from deformux_label.lib.trainers.finetune import FineTune
from deformux_label.lib.trainers.process import end_with_the_server, leave_room_on_the_gpu
from deformux_label.lib.trainers.queue import AlreadyTraining, TrainingQueue, with_queue
from deformux_label.web.audit import AuditLog
from deformux_label.web.install import install
from deformux_label.web.install_login import AUDIT_FILE, install_login
from deformux_label.web.listening import host_of, reason_not_to_start

logger = logging.getLogger(__name__)


class DeformUXLabel(MONAILabelApp):
    """One-click segmentation with DeformUX-Net that learns from submitted labels."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        try:
            self.server_options = ServerOptions.from_conf(conf)
            self.project = Project.from_conf({key: conf[key] for key in conf if key not in SERVER_OPTIONS})
        except InvalidOption as error:
            refuse_to_start(str(error))
        # Training and scoring run in separate processes, which inherit this.
        os.environ[MAX_VOXELS_VARIABLE] = str(self.server_options.max_voxels)
        self.state_folder = self.project.state_folder(app_dir, studies)
        self.models = ServedModels(self.project, self.state_folder)
        self.planner = ProjectPlanner(
            self.state_folder / "plan",
            labels=self.project.labels,
            choices=self.project.choices,
            scans=self._scans,
            sequences=self.project.naming.channels,
            minutes=self.project.train_minutes,
        )
        self.scores = SelectionScores(self.project, self.models, self.state_folder / "selection")
        self.waiting = WaitingVolumes(self.scores)
        self.leases = Leases(self.state_folder / "leases.json", minutes=self.project.lease_minutes)
        self.queue = TrainingQueue(self.state_folder, on_end=self.training_ended)
        self.batches = BatchInferences(self.state_folder)
        self._proposals = Proposals()
        self.dice = DiceScoring(self.project)
        self.click_cache = ClickCache(int(self.project.cache_gb * 1e9))
        self.uploads: Path | None = None
        self._login_warnings: Callable[[], list[str]] = list
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf={},
            name="DeformUX Label",
            description="One-click segmentation with DeformUX-Net that learns from submitted labels",
            version=__version__,
            # Slicer offers clicks on the background only if listed; it numbers labels by position, so it comes last.
            labels=[*self.project.labels, BACKGROUND_LABEL],
        )
        # MONAI Label would start a scoring process at every Next Sample; here a new model does.
        self._auto_update_scoring = False
        logger.info("Project %s: %s", self.state_folder.name, self.project.to_conf())

    def init_datastore(self) -> Datastore:
        if self.studies.startswith(("http://", "https://")):
            refuse_to_start(f"studies must be a folder with volumes, not a web address; got {self.studies!r}")
        try:
            return CheckedDatastore(
                self.studies,
                labels=self.project.labels,
                image_channels=self.project.image_channels,
                slice_rule=self.project.annotated_slices,
            )
        except StudiesError as error:
            refuse_to_start(str(error))

    def init_infers(self) -> dict[str, InferTask]:
        # Slicer runs the first one automatically on each new case.
        return {
            "segmentation": Segmentation(self.project, self.models, self.click_cache),
            "edit": Edit(self.project, self.models, self.click_cache),
            **all_scribble_tasks(self.project, self.models, self.click_cache),
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        return {"segmentation": FineTune(self.project, self.models, self.state_folder, self.planner)}

    def _scans(self) -> list[Path]:
        """Return the files of all scans."""
        datastore = self.datastore()
        return [Path(datastore.get_image_uri(image)) for image in datastore.list_images()]

    def _plan_at_start(self) -> None:
        """Log the plan of a training from scratch, which until then also says how scans are read without a model."""
        try:
            self.planner.device = checked_device(None)
            self.planner.from_scratch(self._trainers["segmentation"].cases(self.datastore()), quick=True)
        except (ValueError, OSError) as error:
            logger.info("There is no plan yet: %s", error)

    def init_strategies(self) -> dict[str, Strategy]:
        return all_strategies(self.scores, self.leases, self.request_scoring, self.waiting)

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        return {"dice": self.dice, "uncertainty": SelectionScoring(self.scores)}

    def on_init_complete(self) -> None:
        # Called only in the server, when it is ready to answer.
        from monailabel.app import app as server

        options = self.server_options
        if reason := reason_not_to_start(host_of(sys.argv), options.users, insecure=options.insecure):
            refuse_to_start(reason)
        # Otherwise idle training threads would spin on cores that a segmentation needs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.uploads = private_uploads()
        if settings.MONAI_LABEL_SESSIONS:
            path = settings.MONAI_LABEL_SESSION_PATH
            folder = own_folder(Path(path)) if path else self.uploads
            self._sessions = VolumeSessions(folder, settings.MONAI_LABEL_SESSION_EXPIRY, self.project.naming)
        install(server, self)
        self._login_warnings = install_login(server, self)
        end_background_with_this_server()
        self.queue.start()
        threading.Thread(target=self.models.check, name="check of the models", daemon=True).start()
        threading.Thread(target=self.datastore().check_files, name="check of the studies", daemon=True).start()
        threading.Thread(target=self._plan_at_start, name="plan", daemon=True).start()
        super().on_init_complete()

    def _load_sessions(self, load: bool = False) -> None:  # noqa: ARG002
        # MONAI Label's sessions unpack archives; the server creates its own at the start.
        return None

    def scoring_methods(self) -> dict[str, ScoringMethod]:
        """Return the scoring methods by name."""
        return self._scoring_methods

    def options_of(self, kind: str, name: str) -> set[str]:
        """Return the options of a trainer or strategy, including MONAI Label's own."""
        if kind == "trainers":
            return {*known("model to train", name, self._trainers).config(), "gpus"}
        return {*known("strategy", name, self._strategies).info().get("config", {})}

    def info(self) -> dict[str, Any]:
        info = super().info()
        for name, stats in info["train_stats"].items():
            info["train_stats"][name] = with_queue(stats, self.queue)
        # The leases and the queue share a file, and its warnings.
        of_state = [*self.leases.warnings(), *self.queue.warnings()]
        of_studies = self.waiting.now(self.datastore()).warnings()
        of_studies += self.datastore().warnings()
        found = [*self._login_warnings(), *self.models.warnings(), *of_state, *of_studies]
        if found:
            info["warnings"] = list(dict.fromkeys(found))
        return info

    def versions(self) -> ModelVersions:
        """Return the project's model versions."""
        return self.models.versions

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        datastore = datastore or self.datastore()
        sent = with_login(request)
        model = sent.get("model")
        task = known("model", model, self._infers)
        options = InferenceOptions.model_validate(sent)
        sessions = self.sessions()
        folders = [Path(self.studies), *([Path(sessions.store_path)] if sessions is not None else [])]
        scan = find_scan(sent.get("image"), datastore, folders, self.uploads)
        scan = dataclasses.replace(scan, sequences=self.project.naming.files_of(Path(scan.path)))
        if options.save_label:
            require("annotator", "storing a segmentation (save_label)")
        if options.uncertainty and scan.image_id is not None:
            require("annotator", "storing an uncertainty map (uncertainty)")
        if options.save_label and self.models.current() is None:
            raise HTTPException(409, UNTRAINED)
        file, params = task(task.parsed(sent, InferenceRequest(scan=scan, options=options), self.uploads))
        with_map = store_uncertainty(datastore, scan.image_id, params)
        if with_map:
            version = params["model_version"]
            note(what="store uncertainty map", image=scan.image_id, tag=UNCERTAINTY_TAG, version=version)
        if scan.image_id is not None and "model_version" in params:
            self._proposals.remember(annotator_of(sent), scan.image_id, params["model_version"])
        label = file
        if options.save_label and scan.image_id is not None:
            info = with_login({"model": model, "params": params})
            label = datastore.save_label(scan.image_id, file, options.label_tag, info)
            stored = {"tag": options.label_tag, "version": params["model_version"]}
            note(what="store segmentation", image=scan.image_id, **stored, uncertainty_map=with_map or None)
        return {"label": label, "tag": DefaultLabelTag.ORIGINAL, "file": file, "params": params}

    def check_batch_inference(self, model: str) -> None:
        """Refuse a batch inference that cannot work, before its process is started."""
        task = known("model", model, self._infers)
        if task.type != InferType.SEGMENTATION:
            able = [name for name, other in self._infers.items() if other.type == InferType.SEGMENTATION]
            raise HTTPException(400, f"{model!r} needs clicks or scribbles; batch inference runs {', '.join(able)}")
        if self.datastore().read_only:
            raise HTTPException(409, "the studies folder is read-only, so no segmentation could be stored")
        if self.models.current() is None:
            raise HTTPException(409, UNTRAINED)

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        # Runs in a separate process, which the server started.
        end_with_the_server()
        os.nice(10)  # requests to the server have priority
        leave_room_on_the_gpu()
        self.uploads = private_uploads()
        studies = datastore or self.datastore()
        given: list[str] = [key for key in ("model", "device", "logging", "client_id") if key in request]
        options = {key: request[key] for key in given}
        options |= {"save_label": True, "label_tag": DefaultLabelTag.ORIGINAL.value}

        log = AuditLog(self.state_folder / AUDIT_FILE)
        who = {"user": request.get("user"), "address": "batch inference", "task": request.get("task_id")}

        def infer(image: str) -> None:
            with calling(Caller()) as caller:
                result = self.infer({**options, "image": image}, studies)
            log.record(**{**who, **caller.done})
            Path(result["file"]).unlink(missing_ok=True)

        return run_batch(self.state_folder, request.get("task_id"), images_of(studies, request), infer)

    def infer_wsi(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:  # noqa: ARG002
        raise HTTPException(404, "this server segments volumes, not whole-slide images")

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        strategy = known("strategy", request.get("strategy"), self._strategies)
        # A reply without an id gives the reason instead.
        reply = strategy(request, self.datastore())
        return {**reply, "path": self.datastore().get_image_uri(reply["id"])} if "id" in reply else reply

    def check_training(self, model: str | None, options: dict[str, Any]) -> None:
        """Refuse a training that cannot work, before its process is started."""
        if model is not None:
            known("model to train", model, self._trainers)
        for name, trainer in self._trainers.items():
            if model in (None, name):
                trainer.check(options if model else options.get(name) or {}, self.datastore())

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        # Runs in a separate process, which the queue started.
        trainer = known("model to train", request.get("model"), self._trainers)
        end_with_the_server()
        os.nice(10)  # requests to the server have priority
        leave_room_on_the_gpu()
        try:
            # A training of a killed server may take a moment to end.
            with FileLock(self.state_folder / "process.lock"):
                return trainer(request, self.datastore())
        except HTTPException as error:
            raise SystemExit(f"The training failed: {error.detail}") from None

    def training_ended(self, _task: Mapping[str, Any]) -> None:
        """Use the result of a training; runs in the server."""
        self.model_changed()

    def model_changed(self) -> None:
        """Load the published model before a request needs it, and rescore the volumes with it."""
        self.request_scoring()
        threading.Thread(target=self._preload, name="preload", daemon=True).start()

    def _preload(self) -> None:
        name = self.models.current()
        self.click_cache.forget_other_versions(name)
        if name is None:
            return
        try:
            self.models.load(name, checked_device(None))
        except (ValueError, RuntimeError) as error:
            logger.warning("Model %s could not be preloaded: %s", name, error)

    def request_scoring(self) -> None:
        """Score the volumes in the background, unless scoring is already running."""
        if self._server_mode and not processes("scoring"):
            self.async_scoring("uncertainty")

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        known("scoring method", request.get("method"), self._scoring_methods)
        if not self._server_mode:
            end_with_the_parent()
            # Below a training too: one often begins while volumes are scored, and takes as many steps as its first
            # seconds promise. With equal priorities that was half of what there was time for.
            os.nice(19)
        return super().scoring(request, datastore)

    def on_save_label(self, image_id: str, label_id: str) -> None:
        super().on_save_label(image_id, label_id)
        try:
            self.dice.score(self.datastore(), image_id)
        except (OSError, HTTPException) as error:
            # The label is stored, so the request must not fail.
            logger.warning("No Dice for %s: %s", image_id, error)

    def submitted(self, image_id: str, tag: str) -> None:
        """Release the volume of a saved label, and queue a training if one is due."""
        if tag != DefaultLabelTag.FINAL.value:
            return
        try:
            self.leases.release(image_id)
            if self.queue.submitted(image_id, self._checksum(image_id), self.project.auto_train):
                self.check_training("segmentation", {})
                self.queue.add({"model": "segmentation"}, automatic=True)
        except (HTTPException, AlreadyTraining) as error:
            logger.info("No training yet: %s", getattr(error, "detail", error))
        except OSError as error:
            # The label is stored, so the request must not fail.
            logger.error("The label of %r is stored, but its lease could not be released: %s", image_id, error)

    def _checksum(self, image_id: str) -> str:
        """Return the checksum of an image's submitted label."""
        datastore = self.datastore()
        revisions = datastore.revisions if isinstance(datastore, CheckedDatastore) else None
        newest = revisions.newest(image_id, DefaultLabelTag.FINAL.value) if revisions else None
        return newest.sha256 if newest is not None else uuid.uuid4().hex

    def started_from(self, annotator: str, image_id: str) -> str | None:
        """Return the version of the model that made the proposal shown to an annotator; None if unknown."""
        lease = self.leases.active().get(image_id)
        leased = lease.model_version if lease is not None and lease.annotator == annotator else None
        return self._proposals.find(annotator, image_id, leased)

    def bundle_path(self, model: str | None) -> None:
        # MONAI Label calls this before every background task, so unknown models are refused here.
        if model is not None:
            known("model", model, self._infers | self._trainers)

    def model_file(self, model: str, validate: bool = True) -> str:  # noqa: ARG002 - MONAI Label's signature
        # MONAI Label's endpoints overwrite and delete the file in place, while requests use it.
        raise HTTPException(405, "only training writes model versions; they cannot be uploaded or downloaded")
