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
	"kedge/server/arguments"
	"kedge/server/loopback"
)

// Scheduler is the component that runs kube-scheduler, once. It is made anew for each
// term of leadership.
type Scheduler struct {
	loopback *loopback.Loopback
	opts     *options.Options
	hasNode  bool // this machine will register one
}

// NewScheduler parses the component's flags and keeps the rest.
func NewScheduler(cfg Config, lb *loopback.Loopback) (*Scheduler, error) {
	s := &Scheduler{loopback: lb, opts: options.NewOptions(), hasNode: cfg.HasNode}
	fs := pflag.NewFlagSet("kube-scheduler", pflag.ContinueOnError)
	for _, f := range s.opts.Flags.FlagSets {
		fs.AddFlagSet(f)
	}
	args, err := arguments.Scheduler(map[string]string{
		"leader-elect": "false",
		"master":       nowhere, // satisfies the option; the clients are replaced
		"profiling":    "false",
		"secure-port":  "0", // metrics and health are the API server's
	}, cfg.SchedulerArgs)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(args); err != nil {
		return nil, fmt.Errorf("%s: %w", arguments.FromScheduler, err)
	}
	return s, componentflags.ApplyVerbosity(s.opts.Logs, arguments.FromScheduler)
}

// Name implements lifecycle.Component.
func (s *Scheduler) Name() string { return "scheduler" }

// Run implements lifecycle.Component. It is ready when its caches are filled and
// the first pod can be scheduled.
func (s *Scheduler) Run(ctx context.Context, ready func()) error {
	cfg, err := s.configure(ctx)
	if err != nil {
		return err
	}
	defer cfg.InformerFactory.Shutdown()    // gives its name back, for the next term
	defer configz.Delete("componentconfig") // likewise what app.Run registers
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
		return fmt.Errorf("make the scheduler: %w", err)
	}
	go func() {
		if sched.WaitForHandlersSync(ctx) == nil {
			ready()
		}
	}()
	if s.hasNode {
		waitForNode(ctx, cc.Client)
	}
	// Without leader election Run ends only with the context, and always with
	// an error that says no more than that.
	err = app.Run(ctx, &cc, sched)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// firstNodeWithin is how long the scheduler waits for this machine's own node.
const firstNodeWithin = 3 * time.Second

// waitForNode returns when the cluster has a node. To upstream it is an error when
// there is none, and a pod that meets it is put off for one to two seconds, whatever
// happens meanwhile: on a machine that starts, the pods that everybody waits for. A
// pod that merely fits no node yet is looked at again when a node changes.
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

// configure makes the component's configuration with clients that use the loopback.
func (s *Scheduler) configure(ctx context.Context) (*schedulerconfig.Config, error) {
	defaults, err := latest.Default()
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's configuration: %w", err)
	}
	s.opts.ComponentConfig = defaults
	if s.opts.InformerName, err = cache.NewInformerName("kube-scheduler"); err != nil {
		return nil, fmt.Errorf("make the scheduler's configuration: %w", err)
	}
	if errs := s.opts.Validate(); len(errs) > 0 {
		return nil, fmt.Errorf("%s: %w", arguments.FromScheduler, errors.Join(errs...))
	}
	cfg, err := s.opts.Config(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", arguments.FromScheduler, err)
	}
	cfg.KubeConfig = s.loopback.Config("system:kube-scheduler")
	client, err := kubernetes.NewForConfig(cfg.KubeConfig)
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's client: %w", err)
	}
	dynamicClient, err := dynamic.NewForConfig(cfg.KubeConfig)
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's client: %w", err)
	}
	cfg.Client = client
	cfg.InformerFactory = scheduler.NewInformerFactory(client, 0, s.opts.InformerName)
	cfg.DynInformerFactory = dynamicinformer.NewFilteredDynamicSharedInformerFactory(dynamicClient, 0, corev1.NamespaceAll, nil)
	cfg.EventBroadcaster = events.NewEventBroadcasterAdapterWithContext(ctx, client)
	return cfg, nil
}
