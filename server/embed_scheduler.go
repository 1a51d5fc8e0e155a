package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	"k8s.io/component-base/configz"
	"k8s.io/kubernetes/cmd/kube-scheduler/app"
	schedulerconfig "k8s.io/kubernetes/cmd/kube-scheduler/app/config"
	"k8s.io/kubernetes/cmd/kube-scheduler/app/options"
	"k8s.io/kubernetes/pkg/scheduler"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"

	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
	"kedge/server/arguments"
	"kedge/server/loopback"
)

// Scheduler is the component that runs kube-scheduler once. A new Scheduler is made for each term of
// leadership.
type Scheduler struct {
	loopback *loopback.Loopback
	opts     *options.Options
	hasNode  bool // a node on this machine will register
}

// NewScheduler parses the component's flags and stores the rest.
func NewScheduler(cfg Config, lb *loopback.Loopback) (*Scheduler, error) {
	opts, err := parseScheduler(map[string]string{
		"leader-elect": "false",
		"master":       unreachableURL, // satisfies the option; the clients are replaced later
		"profiling":    "false",
		"secure-port":  "0", // the API server's endpoint has metrics and health
	}, cfg.SchedulerArgs)
	return &Scheduler{loopback: lb, opts: opts, hasNode: cfg.HasNode}, err
}

// parseScheduler lays user's flags over the defaults.
func parseScheduler(defaults map[string]string, user []string) (*options.Options, error) {
	opts := options.NewOptions()
	fs := pflag.NewFlagSet("kube-scheduler", pflag.ContinueOnError)
	for _, f := range opts.Flags.FlagSets {
		fs.AddFlagSet(f)
	}
	args, err := arguments.Scheduler(defaults, user)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(args); err != nil {
		return nil, errorkind.BadSetting(arguments.FromScheduler, ": %w", err)
	}
	return opts, componentflags.ApplyVerbosity(opts.Logs, arguments.FromScheduler)
}

// Name implements lifecycle.Component.
func (s *Scheduler) Name() string { return "scheduler" }

// Run implements lifecycle.Component. It calls ready when its caches are filled and the first pod can be
// scheduled.
func (s *Scheduler) Run(ctx context.Context, ready func()) error {
	cfg, err := s.configure(ctx)
	if err != nil {
		return err
	}
	defer cfg.InformerFactory.Shutdown()    // releases its name for the next term
	defer configz.Delete("componentconfig") // app.Run registers it
	cc := cfg.Complete()
	sched, err := scheduler.New(ctx, cc.Client, cc.InformerFactory, cc.DynInformerFactory,
		func(name string) events.EventRecorderLogger { return cc.EventBroadcaster.NewRecorder(name) },
		scheduler.WithComponentConfigVersion(cc.ComponentConfig.TypeMeta.APIVersion),
		scheduler.WithKubeConfig(cc.KubeConfig),
		scheduler.WithProfiles(cc.ComponentConfig.Profiles...),
		scheduler.WithPercentageOfNodesToScore(cc.ComponentConfig.PercentageOfNodesToScore),
		scheduler.WithPodMaxBackoffSeconds(cc.ComponentConfig.PodMaxBackoffSeconds),
		scheduler.WithPodInitialBackoffSeconds(cc.ComponentConfig.PodInitialBackoffSeconds),
		scheduler.WithPodMaxInUnschedulablePodsDuration(cc.PodMaxInUnschedulablePodsDuration),
		scheduler.WithExtenders(cc.ComponentConfig.Extenders...),
		scheduler.WithParallelism(cc.ComponentConfig.Parallelism),
	)
	if err != nil {
		return fmt.Errorf("create the scheduler: %w", err)
	}
	go func() {
		if sched.WaitForHandlersSync(ctx) == nil {
			ready()
		}
	}()
	if s.hasNode {
		waitForNode(ctx, cc.Client)
	}
	// Without leader election Run returns only when the context ends, with an error that has no further
	// information.
	err = app.Run(ctx, &cc, sched)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// firstNodeWithin is the maximum time that the scheduler waits for this machine's own node.
const firstNodeWithin = 3 * time.Second

// waitForNode returns when the cluster has a node. Without nodes upstream's scheduler treats a pod as failed
// with an error, and tries it again only after one to two seconds: on a starting machine these are the system's
// first pods. A pod that fits no existing node is tried again as soon as a node changes.
func waitForNode(ctx context.Context, c kubernetes.Interface) {
	ctx, cancel := context.WithTimeout(ctx, firstNodeWithin)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: 1}); err == nil && len(nodes.Items) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// configure returns the component's configuration with clients that use the loopback.
func (s *Scheduler) configure(ctx context.Context) (*schedulerconfig.Config, error) {
	defaults, err := latest.Default()
	if err != nil {
		return nil, fmt.Errorf("create the scheduler's configuration: %w", err)
	}
	s.opts.ComponentConfig = defaults
	if s.opts.InformerName, err = cache.NewInformerName("kube-scheduler"); err != nil {
		return nil, fmt.Errorf("create the scheduler's configuration: %w", err)
	}
	if errs := s.opts.Validate(); len(errs) > 0 {
		return nil, errorkind.BadSetting(arguments.FromScheduler, ": %w", errors.Join(errs...))
	}
	cfg, err := s.opts.Config(ctx)
	if err != nil {
		return nil, errorkind.BadSetting(arguments.FromScheduler, ": %w", err)
	}
	cfg.KubeConfig = s.loopback.Config("system:kube-scheduler")
	client, err := kubernetes.NewForConfig(cfg.KubeConfig)
	if err != nil {
		return nil, fmt.Errorf("create the scheduler's client: %w", err)
	}
	dynamicClient, err := dynamic.NewForConfig(cfg.KubeConfig)
	if err != nil {
		return nil, fmt.Errorf("create the scheduler's client: %w", err)
	}
	cfg.Client = client
	cfg.InformerFactory = scheduler.NewInformerFactory(client, 0, s.opts.InformerName)
	cfg.DynInformerFactory = dynamicinformer.NewFilteredDynamicSharedInformerFactory(dynamicClient, 0, corev1.NamespaceAll, nil)
	cfg.EventBroadcaster = events.NewEventBroadcasterAdapterWithContext(ctx, client)
	return cfg, nil
}
