// Command control is the control plane of the composition with which kedge is compared: etcd over TCP,
// kube-apiserver, kube-controller-manager and kube-scheduler in one process, each started like upstream's own
// command with ordinary flags, without tuning. Only scripts/bench runs it; it is not part of the product.
//
// Upstream's commands themselves cannot share a process: each of them registers for the process's signals, and
// the second one panics.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/client-go/rest"
	cliflag "k8s.io/component-base/cli/flag"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controllersoptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// settings is the content of the file that is the only argument; scripts/bench writes it.
type settings struct {
	EtcdDir    string
	EtcdClient string // URL to listen on
	EtcdPeer   string // URL to listen on
	Ready      string // URL that returns 200 when the API server is ready

	APIServer   []string // flags
	Controllers []string
	Scheduler   []string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "control:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: control SETTINGS.json")
	}
	data, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var s settings
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	// Upstream's commands do this too.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})

	etcd, err := startEtcd(ctx, s)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer etcd.Close()

	// All flags are parsed before the feature gates of all components take effect.
	api := apiserveroptions.NewServerRunOptions()
	if err := parse(api.Flags(), s.APIServer); err != nil {
		return fmt.Errorf("kube-apiserver: %w", err)
	}
	kcm, err := controllersoptions.NewKubeControllerManagerOptions()
	if err != nil {
		return err
	}
	known, disabled, aliases := controllers.KnownControllers(), controllers.ControllersDisabledByDefault(), controllers.ControllerAliases()
	flags := kcm.Flags(known, disabled, aliases)
	kcm.ParsedFlags = &flags
	if err := parse(flags, s.Controllers); err != nil {
		return fmt.Errorf("kube-controller-manager: %w", err)
	}
	sched := scheduleroptions.NewOptions()
	if err := parse(*sched.Flags, s.Scheduler); err != nil {
		return fmt.Errorf("kube-scheduler: %w", err)
	}
	if err := api.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}

	ended := make(chan error, 3)
	apiCtx, stopAPI := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAPI()
	go func() { ended <- ignore(apiCtx, runAPIServer(apiCtx, api)) }()
	if err := waitReady(ctx, s.Ready, ended); err != nil {
		return err
	}
	go func() {
		c, err := kcm.Config(ctx, known, disabled, aliases)
		if err == nil {
			err = controllers.Run(ctx, c.Complete())
		}
		ended <- ignore(ctx, err)
	}()
	go func() {
		cc, s, err := scheduler.Setup(ctx, sched)
		if err == nil {
			err = scheduler.Run(ctx, cc, s)
		}
		ended <- ignore(ctx, err)
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	stopAPI()
	for range 3 {
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			return nil // a component that does not stop in time is abandoned
		}
	}
	return nil
}

// ignore drops the error of a component after the stop was requested.
func ignore(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func parse(sets cliflag.NamedFlagSets, args []string) error {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	for _, f := range sets.FlagSets {
		fs.AddFlagSet(f)
	}
	return fs.Parse(args)
}

func startEtcd(ctx context.Context, s settings) (*embed.Etcd, error) {
	client, err := url.Parse(s.EtcdClient)
	if err != nil {
		return nil, err
	}
	peer, err := url.Parse(s.EtcdPeer)
	if err != nil {
		return nil, err
	}
	cfg := embed.NewConfig()
	cfg.Dir = s.EtcdDir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err := <-e.Err():
		return nil, err
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	}
}

func runAPIServer(ctx context.Context, o *apiserveroptions.ServerRunOptions) error {
	completed, err := o.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return errors.Join(errs...)
	}
	return apiserver.Run(ctx, completed)
}

// waitReady saves the other components the delay after a refused connection.
func waitReady(ctx context.Context, url string, ended <-chan error) error {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	for {
		if resp, err := client.Get(url); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
