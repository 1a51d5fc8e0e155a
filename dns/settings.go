package dns

import (
	"context"
	"errors"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"kedge/dns/custom"
)

// ConfigMap is the name of the administrator's ConfigMap, in the namespace kube-system.
const ConfigMap = "kedge-dns"

// settings watches the ConfigMap and applies it.
type settings struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface
	answer *answerer

	informer cache.SharedIndexInformer
	events   record.EventBroadcaster
	recorder record.EventRecorder
}

func newSettings(cfg Config, client kubernetes.Interface, answer *answerer, log *slog.Logger) *settings {
	s := &settings{cfg: cfg, log: log, client: client, answer: answer, events: record.NewBroadcaster()}
	s.recorder = s.events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-dns"})
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0,
		informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, ConfigMap).String()
		}))
	s.informer = factory.Core().V1().ConfigMaps().Informer()
	return s
}

// run applies the ConfigMap until ctx ends.
func (s *settings) run(ctx context.Context) {
	s.events.StartRecordingToSink(&v1core.EventSinkImpl{Interface: s.client.CoreV1().Events("")})
	defer s.events.Shutdown()
	_, err := s.informer.AddEventHandler(handler(s.apply, func(*corev1.ConfigMap) { s.store(&custom.Rules{}) }))
	if err != nil {
		s.log.Error("cannot watch the ConfigMap", "err", err) // does not happen with a new informer
		return
	}
	s.informer.RunWithContext(ctx)
}

// synced reports whether the ConfigMap has been read, if it exists.
func (s *settings) synced() bool { return s.informer.HasSynced() }

// apply applies a ConfigMap, or reports its errors.
func (s *settings) apply(m *corev1.ConfigMap) {
	rules, err := custom.Parse(m.Data, s.cfg.Domain, s.cfg.Addresses)
	if err == nil {
		s.store(rules)
		s.log.Info("settings of the ConfigMap applied", "configmap", ConfigMap)
		return
	}
	s.log.Warn("the ConfigMap has errors; the previous settings stay in force", "configmap", ConfigMap, "err", err)
	mistakes := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		mistakes = joined.Unwrap()
	}
	for _, err := range mistakes {
		var mistake custom.Mistake
		if errors.As(err, &mistake) {
			s.recorder.Event(m, corev1.EventTypeWarning, "Mistake", mistake.Error()+"; the previous settings stay in force")
		}
	}
}

func (s *settings) store(rules *custom.Rules) {
	s.answer.rules.Store(rules)
	s.answer.outside.SetStubs(rules.Stubs)
}
