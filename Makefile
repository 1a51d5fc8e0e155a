# kedge: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# scripts/deps.sh installs Go there if the machine's own is missing or too old.
export PATH := $(CURDIR)/build/go/bin:$(PATH):/usr/local/go/bin

# Exported variables reach recipes, but not $(shell) before make 4.4.
GO := PATH='$(PATH)' go

ARCH ?= $(shell $(GO) env GOARCH 2>/dev/null || dpkg --print-architecture)
HOSTARCH := $(shell $(GO) env GOARCH 2>/dev/null || dpkg --print-architecture)
BIN := bin/kedge$(if $(filter-out $(HOSTARCH),$(ARCH)),-$(ARCH))

# One set of flags for everything, so that builds and tests share one cache.
export GOFLAGS := -trimpath -buildvcs=false
export CGO_ENABLED := 0

VERSION := $(shell git describe --tags --match 'v[0-9]*' --always --abbrev=12 --dirty 2>/dev/null || echo dev)
COMMIT := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
DATE := $(shell TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd 2>/dev/null)
KUBE_VERSION = $(shell $(GO) list -m -f '{{.Version}}' k8s.io/kubernetes)
RUNC_VERSION = $(shell $(GO) list -m -f '{{.Version}}' github.com/opencontainers/runc)
CONTAINERD_VERSION = $(shell $(GO) list -m -f '{{.Version}}' github.com/containerd/containerd/v2)
KUBE_MINOR = $(word 2,$(subst ., ,$(KUBE_VERSION)))
LDFLAGS = -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.buildDate=$(DATE) -X main.runcVersion=$(RUNC_VERSION) \
	$(foreach p,k8s.io/component-base/version k8s.io/client-go/pkg/version,-X $(p).gitVersion=$(KUBE_VERSION)+kedge -X $(p).gitMajor=1 -X $(p).gitMinor=$(KUBE_MINOR) -X $(p).gitCommit=$(COMMIT) -X $(p).gitTreeState=clean -X $(p).buildDate=$(DATE)) \
	-X github.com/containerd/containerd/v2/version.Version=$(CONTAINERD_VERSION)

# Packages whose tests do not link the Kubernetes components: small binaries.
UNIT = $(shell $(GO) list ./... | grep -v -e '^kedge$$' -e '^kedge/assembly$$' -e '^kedge/server$$' -e '^kedge/agent$$' -e '^kedge/scripts/e2e' -e '^kedge/datastore/upstream')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-22s %s\n", $$1, $$2}'

.PHONY: deps
deps: ## install missing packages for building and testing (Debian, Ubuntu)
	@scripts/deps.sh $(ARCH)

.PHONY: payload
payload: ## build shim, runc and pause, compressed, for ARCH
	@scripts/build-payload.sh $(ARCH)

# The large program is compressed into the small one, the executable for users.
.PHONY: build
build: deps payload ## build the executable for ARCH (amd64 or arm64)
	@mkdir -p bin build/program/$(ARCH)
	@GOARCH=$(ARCH) go build -ldflags '$(LDFLAGS)' -o build/program/$(ARCH)/kedge .
	@if [ build/program/$(ARCH)/kedge -nt launcher/payload/$(ARCH)/manifest.json ]; then go run ./scripts/pack build/program/$(ARCH)/kedge launcher/payload/$(ARCH); fi
	@GOARCH=$(ARCH) go build -ldflags '-s -w' -o $(BIN) ./launcher
	@ls -l build/program/$(ARCH)/kedge $(BIN) | awk '{printf "%s: %.1f MB\n", $$9, $$5/1e6}'

.PHONY: release
release: deps ## build the release of this commit in dist; KEDGE_SIGN_KEY=FILE or KEDGE_UNSIGNED=1, ARCHES="amd64 arm64"
	@scripts/release.sh $(ARCHES)

.PHONY: run
run: build build/e2e/probe ## boot a cluster on this machine and run an application on it
	@scripts/run.sh

.PHONY: stop
stop: ## end the cluster of `make run` and its containers
	@scripts/run.sh stop

.PHONY: fmt
fmt: ## format the source
	gofmt -w $$(git ls-files '*.go')

.PHONY: check
check: deps payload ## format, vet, shellcheck, house rules and unit tests with the race detector
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo 'not formatted (run make fmt):'; gofmt -l $$(git ls-files '*.go'); exit 1; }
	shellcheck $$(git ls-files '*.sh' ':!:*/testdata/*')
	go vet ./...
	@# Those that call the kernel by number, or have files for one architecture.
	GOARCH=$(if $(filter amd64,$(HOSTARCH)),arm64,amd64) go vet ./launcher ./internal/footprint ./preflight ./internal/test/host ./network/nft ./network/nft/policies ./throwaway/machine
	@# Without that, a program with the race detector sleeps for a second before it exits.
	CGO_ENABLED=1 GORACE=atexit_sleep_ms=0 go test -race $(or $(UNIT),$(error go list finds no packages))

.PHONY: test
test: bench-dns-programs check build test-datastore test-upstream-storage e2e conformance-fast ## run all tests

.PHONY: clean
clean: ## remove built files
	rm -rf bin build dist

.PHONY: build-e2e
build-e2e: ## build the programs of the end-to-end tests' images
	@mkdir -p build/e2e
	@go build -ldflags '-s -w' -o build/e2e/agnhost k8s.io/kubernetes/test/images/agnhost
	@$(MAKE) --no-print-directory build/e2e/probe
	@go build -ldflags '-s -w -X main.buildDate=2100-01-01T00:00:00Z' -o build/e2e/kedge-of-2100 .
	@go build -ldflags '-s -w' -o build/e2e/badversion ./scripts/e2e/badversion
	@rm -rf build/e2e/_launcher && mkdir -p build/e2e/_launcher/payload/$(HOSTARCH) && cp $$(git ls-files 'launcher/*.go' ':!:launcher/*_test.go' ':!:launcher/*/*') build/e2e/_launcher
	@go run ./scripts/pack build/e2e/badversion build/e2e/_launcher/payload/$(HOSTARCH)
	@go build -ldflags '-s -w' -o build/e2e/badrelease ./build/e2e/_launcher

.PHONY: build/e2e/probe
build/e2e/probe:
	@mkdir -p build/e2e
	@go build -ldflags '-s -w' -o $@ ./scripts/e2e/probe

.PHONY: e2e
ifdef FOCUS
e2e: build build-conformance ## end-to-end tests with real containers, RUN=REGEXP; FOCUS=REGEXP: upstream's matching tests; needs root
	go run ./scripts/upstream -servers 1 -agents 0 -resume=false $(UPSTREAM)
else
e2e: build build-e2e
	@scripts/e2e.sh $(if $(RUN),-run '$(RUN)')
endif

# Options of both targets that run upstream's suite.
UPSTREAM = $(if $(FOCUS),-focus '$(FOCUS)') $(if $(SKIP),-skip '$(SKIP)') $(if $(PARALLEL),-procs $(PARALLEL)) \
	$(if $(DUALSTACK),-dual-stack) $(if $(POOL),-pool)

.PHONY: conformance
conformance: build build-conformance ## upstream's conformance suite on a cluster of its own; FOCUS=, SKIP=, PARALLEL=4, SERVERS=1, AGENTS=2, RESUME=1; needs root
	go run ./scripts/upstream $(UPSTREAM) -servers $(or $(SERVERS),1) -agents $(or $(AGENTS),2) -resume=$(or $(RESUME),1)

.PHONY: conformance-fast
conformance-fast: build build-conformance ## a part of the suite, of every area: scripts/upstream/fast.txt
	@if [ "$$(id -u)" != 0 ]; then echo 'SKIP: clusters need root'; else go run ./scripts/upstream -list scripts/upstream/fast.txt -resume=false; fi

.PHONY: build-conformance
build-conformance: deps payload ## build Kubernetes' own end-to-end suite and its images
	@scripts/build-conformance.sh

.PHONY: test-datastore
test-datastore: ## the datastore's members under faults, which takes minutes; some need root
	KEDGE_TEST_LONG=1 go test -count=1 -timeout 20m ./datastore

# The tests of the datastore under faults that take as long as they are told to.
TORTURES := TestPowerCut|TestPowerCutDuring|TestDamages|TestDiskErrors|TestOneOfThreeHasABadDisk|TestLeaderIsPaused|TestOneWayAndFlappingLinks|TestBadNetwork|TestDefragmentUnderLoad

.PHONY: torture
torture: ## cut the power of the datastore CUTS=2000 times on a disk that is recorded, damage each of its files, give it bad disks and networks, and let it panic at every failpoint, which takes hours; prints what became of it; KEDGE_TORTURE_SEED=N repeats the choices of a run; needs root
	KEDGE_TEST_LONG=1 KEDGE_TORTURE=$(or $(CUTS),2000) go test -count=1 -timeout 8h -v -artifacts -run '^($(TORTURES))$$' ./datastore
	@$(MAKE) --no-print-directory test-failpoints

.PHONY: test-failpoints
test-failpoints: deps ## let the datastore panic once at each failpoint of etcd, alone and as one of three, in a build of its own; needs root
	@scripts/failpoints.sh

.PHONY: test-long
test-long: build build-e2e ## tests that take too long for make test: five servers, a minute of each network backend, 50 clusters created and killed, every file with every damage, the upgrade of running clusters, another key for Secrets of three servers, installations beside Docker and without a trace, on emulated machines, a bundle of 3 GB, 50 upgrades that are killed, upgrades on a full disk, from a release, of drained nodes, and 8 with power cuts
	KEDGE_TEST_EARLIER=$$(scripts/build-earlier.sh cd4a154) && export KEDGE_TEST_EARLIER && \
		go test -count=1 -timeout 20m -v -run 'TestUpgrade$$' ./scripts/e2e/cluster && \
		go test -count=1 -timeout 20m -v -run 'TestUpgradeFromEarlier$$|TestUpgradeOfEarlierCluster$$' ./scripts/e2e/appliance
	KEDGE_TEST_LONG=1 KEDGE_SOAK=60 KEDGE_KEPT=10m go test -count=1 -timeout 90m -v -p 1 -run 'TestGrowth$$|TestBackends$$|TestKeptFiles$$' ./scripts/e2e/faults ./scripts/e2e/network ./scripts/e2e/storage
	KEDGE_TEST_LONG=1 go test -count=1 -timeout 60m -v -run 'TestLargeBundle$$|TestUpgradeOfCluster$$|TestUpgradeObject$$|TestUpgradeIsKilled$$|TestUpgradeOnAFullDisk$$|TestUpgradeFromRelease$$|TestUpgradeDrains$$' ./scripts/e2e/appliance
	KEDGE_TEST_LONG=1 go test -count=1 -timeout 20m -v -run 'TestSecretsEncryptOfCluster$$' ./scripts/e2e/cluster
	go run ./scripts/bench/up -stress 50
	scripts/systemd-machine.sh 'TestBesideDocker$$'
	scripts/systemd-machine.sh 'TestUninstallLeavesNothing$$'
	scripts/systemd-machine.sh 'TestInstallWithSystemd$$'
	scripts/systemd-machine.sh 'TestUpgradeWithSystemd$$'
	scripts/openrc-machine.sh emulated
	scripts/power-cuts.sh $(HOSTARCH) 8 upgrades
	@$(MAKE) --no-print-directory reproduce

.PHONY: reproduce
reproduce: deps ## build the release of this commit twice, in different folders and with an empty build cache, and compare; ARCHES="amd64 arm64"
	@scripts/reproduce.sh $(or $(ARCHES),$(HOSTARCH))

.PHONY: power-cuts
power-cuts: build ## cut the power of an emulated machine with kedge, under load; DURING=upgrades: in the middle of upgrades; ARCH=arm64, CYCLES=5
	@[ $(ARCH) = $(HOSTARCH) ] || $(MAKE) build ARCH=$(HOSTARCH)
	scripts/power-cuts.sh $(ARCH) $(or $(CYCLES),5) $(or $(DURING),load)

.PHONY: systemd-machine
systemd-machine: build build-e2e ## end-to-end tests on an emulated Debian where systemd manages the cgroups; TESTS=REGEXP; needs root
	scripts/systemd-machine.sh '$(or $(TESTS),TestLifeOfNode$$|TestResourcesAreCgroupSettings$$|TestOutOfMemory$$|TestProcessorLimitThrottles$$|TestQualityOfServiceClasses$$|TestTimerSlack$$)'

.PHONY: openrc-machine
openrc-machine: build build-e2e ## the life of an installation with OpenRC, in a Debian below a folder, or with EMULATED=1 on a machine that it boots; needs root
	scripts/openrc-machine.sh $(if $(EMULATED),emulated)

.PHONY: test-upstream-storage
test-upstream-storage: ## Kubernetes' own storage tests on our datastore
	go test -count=1 -timeout 30m ./datastore/upstream

.PHONY: reference
reference: build ## write docs/reference from the program
	@mkdir -p docs/reference
	@for page in commands configuration; do bin/kedge reference $$page > docs/reference/$$page.md; done

.PHONY: licences
licences: ## write docs/third-party-licences.md
	@go run ./scripts/licences > build/licences.md && mv build/licences.md docs/third-party-licences.md

# The composition with which kedge is compared is a module of its own, with the same
# versions: its additional dependencies must not be in kedge's go.mod.
PLAIN := github.com/containerd/containerd/v2/cmd/containerd github.com/containerd/containerd/v2/cmd/ctr k8s.io/kubernetes/cmd/kubelet \
	$(addprefix github.com/containernetworking/plugins/plugins/,main/bridge main/loopback ipam/host-local meta/portmap)

.PHONY: bench-plain
bench-plain: ## build the plain composition with which kedge is compared
	@mkdir -p build/bench/plain
	@go build -C scripts/bench/plain -ldflags '-s -w' -o $(CURDIR)/build/bench/plain/ ./control $(PLAIN)

.PHONY: bench-services
bench-services: ## measure the service proxy beside kube-proxy's nftables mode; needs root and, for that, the program nft
	go test ./network/proxy -run '^$$' -bench Begin -benchtime 3x
	go test ./network/proxy -run '^$$' -bench EndpointChange -benchtime 50x
	go test ./network/proxy -run '^$$' -bench FirstPacket -benchtime 20000x
	go test ./network/nft/services -run '^$$' -bench 'Services(All|One|Moved|Repair)' -benchtime 10x
	go test ./network/nft/services -run '^$$' -bench ServicesNew -benchtime 200000x

.PHONY: bench-flannel-program
bench-flannel-program: deps ## build flannel's own backends, a module of its own
	@mkdir -p build/bench
	@go build -C scripts/bench/flannel -ldflags '-s -w' -o $(CURDIR)/build/bench/flannel .

.PHONY: bench-network
bench-network: bench-flannel-program ## measure TCP and UDP between pods of two nodes, by each backend and by flannel's; BENCHFLAGS="-v -count 5"; needs root
	go test ./network/backend -run '^$$' -bench Ways -benchtime 1s -count 3 -timeout 30m $(BENCHFLAGS)
	go test ./network/backend -run '^$$' -bench BesidePlain -benchtime 15x -timeout 30m $(BENCHFLAGS)

.PHONY: bench-tunnel
bench-tunnel: build build-e2e ## measure logs, exec and port-forward through a node's tunnel, and how soon agents switch from a dead server; needs root
	go test ./internal/tunnel -run '^$$' -bench . -benchtime 2s -count 3
	KEDGE_BENCH=1 go test ./scripts/e2e/cluster -count=1 -timeout 20m -v -run 'TestTunnelFigures$$'

.PHONY: bench-cluster
bench-cluster: build build-e2e ## measure joining, and lost requests when one of three servers is killed or restarted; needs root
	KEDGE_BENCH=1 go test ./scripts/e2e/faults -count=1 -timeout 40m -v -run 'TestClusterFigures$$'

.PHONY: bench-appliance
bench-appliance: build build-e2e ## measure an installation from a release, a bundle of 1 GB, and how long an upgrade takes the API away; needs root
	KEDGE_BENCH=1 go test ./scripts/e2e/appliance -count=1 -timeout 40m -v -run 'Figures$$'

.PHONY: bench-store
bench-store: deps ## measure the datastore, in process and behind gRPC, and snapshots and restores of 100 MB and 1 GB: ten minutes, or one with BENCHFLAGS=-short; TMPDIR is on the disk that is measured; STOREFLAGS and SNAPSHOTFLAGS are those of docs/performance.md
	KEDGE_BENCH=1 go test ./datastore -count=1 -timeout 20m -v -run 'TestStoreFigures$$' $(BENCHFLAGS) $(STOREFLAGS)
	KEDGE_BENCH=1 go test ./server/snapshots -count=1 -timeout 20m -v -run 'TestSnapshotFigures$$' $(BENCHFLAGS) $(SNAPSHOTFLAGS)

.PHONY: bench
bench: build bench-plain ## measure kedge beside plain upstream parts; BENCHFLAGS="-n 5 -only start,idle"; needs root
	@go build -o build/bench/bench ./scripts/bench
	@build/bench/bench $(BENCHFLAGS)

.PHONY: bench-up
bench-up: build build-e2e ## measure throwaway clusters; BENCHFLAGS="-n 5", or "-stress 50" to stress them; needs root
	go run ./scripts/bench/up $(BENCHFLAGS)

.PHONY: bench-dns-programs
bench-dns-programs: deps ## build kedge's resolver alone, and CoreDNS, a module of its own
	@mkdir -p build/bench
	@go build -ldflags '-s -w' -o build/bench/resolver ./dns/standalone
	@go build -C scripts/bench/coredns -ldflags '-s -w' -o $(CURDIR)/build/bench/coredns .

.PHONY: bench-dns
bench-dns: bench-dns-programs ## compare kedge's resolver with CoreDNS, in answers and in speed; BENCHFLAGS="-n 3 -services 5000"; needs root
	go test -count=1 ./scripts/bench/dns
	@go run ./scripts/bench/dns $(BENCHFLAGS)
