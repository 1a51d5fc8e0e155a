package support

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// mostObjects bounds the objects of a kind.
const mostObjects = "2000"

// tree has the fields of an object that are copied. A nil tree stands for the whole field.
type tree map[string]tree

// fields makes a tree of paths, in which elements of lists have the list's path. Names separated by | share the rest of a
// path.
func fields(paths ...string) tree {
	t := tree{}
	for _, path := range paths {
		t.add(strings.Split(path, "."))
	}
	return t
}

func (t tree) add(path []string) {
	for name := range strings.SplitSeq(path[0], "|") {
		if len(path) == 1 {
			t[name] = nil
			continue
		}
		if below, ok := t[name]; !ok || below == nil {
			t[name] = tree{}
		}
		t[name].add(path[1:])
	}
}

// filter returns the part of a value that the tree has.
func (t tree) filter(v any) any {
	if t == nil {
		return v
	}
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for name, below := range t {
			if field, ok := v[name]; ok {
				out[name] = below.filter(field)
			}
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = t.filter(v[i])
		}
		return out
	}
	return nil // an object was expected
}

// metadata is copied of all objects. Annotations are not: kubectl keeps the whole object in one of them.
const metadata = "metadata.name|namespace|uid|generation|resourceVersion|creationTimestamp|deletionTimestamp|deletionGracePeriodSeconds|finalizers|labels|generateName"

const (
	owners     = "metadata.ownerReferences.kind|name"
	conditions = "status.conditions.type|status|reason|message|lastTransitionTime|lastUpdateTime|lastProbeTime|lastHeartbeatTime"
	replicas   = "status.replicas|readyReplicas|updatedReplicas|availableReplicas|unavailableReplicas|observedGeneration|currentReplicas|currentNumberScheduled|desiredNumberScheduled|numberReady|numberAvailable|numberMisscheduled|updatedNumberScheduled|numberUnavailable|active|failed|succeeded|startTime|completionTime"
	states     = "status.containerStatuses|initContainerStatuses|ephemeralContainerStatuses."
)

// kind is a kind of objects with its path in the API.
type kind struct {
	name, path string
	fields     tree // nil for metadata only, for which the API is asked
}

func kinds() []kind {
	workload := fields(metadata, owners, "spec.replicas|paused|suspend|parallelism|completions|schedule", "spec.template.spec.containers|initContainers.name|image|resources", conditions, replicas)
	return []kind{
		{"nodes", "/api/v1/nodes", fields(metadata, "spec.podCIDRs|taints|unschedulable", conditions, "status.addresses|allocatable|capacity|nodeInfo")},
		{"namespaces", "/api/v1/namespaces", fields(metadata, "status.phase", conditions)},
		{"pods", "/api/v1/pods", fields(metadata, owners,
			"spec.nodeName|hostNetwork|hostUsers|priorityClassName|priority|runtimeClassName|schedulerName|serviceAccountName|restartPolicy|dnsPolicy|nodeSelector|tolerations|terminationGracePeriodSeconds",
			"spec.containers|initContainers.name|image|imagePullPolicy|resources|ports|restartPolicy", "spec.volumes.name",
			conditions, "status.phase|reason|message|hostIP|podIP|podIPs|startTime|qosClass",
			states+"name|image|imageID|ready|started|restartCount", states+"state|lastState.waiting.reason|message", states+"state|lastState.running.startedAt",
			states+"state|lastState.terminated.exitCode|signal|reason|startedAt|finishedAt")}, // its message is the program's
		{"events", "/api/v1/events", fields("metadata.name|namespace|creationTimestamp", "involvedObject.kind|namespace|name|fieldPath", "reason", "message", "type", "count", "firstTimestamp", "lastTimestamp", "eventTime", "source", "series", "reportingComponent", "reportingInstance")},
		{"services", "/api/v1/services", fields(metadata, "spec.type|clusterIPs|ports|selector|externalTrafficPolicy|internalTrafficPolicy|ipFamilies|ipFamilyPolicy|loadBalancerClass|sessionAffinity|externalIPs", conditions, "status.loadBalancer")},
		{"endpointslices", "/apis/discovery.k8s.io/v1/endpointslices", fields(metadata, "addressType", "ports", "endpoints.addresses|conditions|nodeName", "endpoints.targetRef.kind|namespace|name")},
		{"persistentvolumeclaims", "/api/v1/persistentvolumeclaims", fields(metadata, "spec.accessModes|resources|storageClassName|volumeName|volumeMode", conditions, "status.phase|capacity|accessModes")},
		{"persistentvolumes", "/api/v1/persistentvolumes", fields(metadata, "spec.accessModes|capacity|storageClassName|persistentVolumeReclaimPolicy|volumeMode", "spec.claimRef.namespace|name", "spec.csi.driver", "status.phase|reason|message")},
		{"storageclasses", "/apis/storage.k8s.io/v1/storageclasses", fields(metadata, "provisioner", "reclaimPolicy", "volumeBindingMode")},
		{"csinodes", "/apis/storage.k8s.io/v1/csinodes", fields(metadata, "spec.drivers.name|nodeID")},
		{"volumeattachments", "/apis/storage.k8s.io/v1/volumeattachments", fields(metadata, "spec.attacher|nodeName", "spec.source.persistentVolumeName", "status.attached", "status.attachError.message|time")},
		{"deployments", "/apis/apps/v1/deployments", workload},
		{"replicasets", "/apis/apps/v1/replicasets", workload},
		{"daemonsets", "/apis/apps/v1/daemonsets", workload},
		{"statefulsets", "/apis/apps/v1/statefulsets", workload},
		{"jobs", "/apis/batch/v1/jobs", workload},
		{"cronjobs", "/apis/batch/v1/cronjobs", fields(metadata, "spec.schedule|suspend|timeZone", "status.lastScheduleTime|lastSuccessfulTime")},
		{"networkpolicies", "/apis/networking.k8s.io/v1/networkpolicies", fields(metadata, "spec.podSelector|policyTypes|ingress|egress")},
		{"ingresses", "/apis/networking.k8s.io/v1/ingresses", fields(metadata, "spec.ingressClassName", "spec.rules.host", "status.loadBalancer")},
		{"leases", "/apis/coordination.k8s.io/v1/leases", fields(metadata, "spec.holderIdentity|leaseDurationSeconds|acquireTime|renewTime|leaseTransitions")},
		{"poddisruptionbudgets", "/apis/policy/v1/poddisruptionbudgets", fields(metadata, "spec.minAvailable|maxUnavailable|selector", conditions, "status.currentHealthy|desiredHealthy|disruptionsAllowed|expectedPods")},
		{"horizontalpodautoscalers", "/apis/autoscaling/v2/horizontalpodautoscalers", fields(metadata, "spec.minReplicas|maxReplicas", "spec.scaleTargetRef.kind|name", conditions, "status.currentReplicas|desiredReplicas")},
		{"priorityclasses", "/apis/scheduling.k8s.io/v1/priorityclasses", fields(metadata, "value", "globalDefault", "preemptionPolicy")},
		{"apiservices", "/apis/apiregistration.k8s.io/v1/apiservices", fields(metadata, "spec.group|version|service", conditions)},
		{"customresourcedefinitions", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", fields(metadata, "spec.group|scope", "spec.names.kind|plural", "spec.versions.name|served|storage", conditions)},
		{"validatingwebhookconfigurations", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations", webhook()},
		{"mutatingwebhookconfigurations", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", webhook()},
		{"secrets", "/api/v1/secrets", nil},
		{"configmaps", "/api/v1/configmaps", nil},
		{"serviceaccounts", "/api/v1/serviceaccounts", nil},
	}
}

func webhook() tree {
	return fields(metadata, "webhooks.name|failurePolicy|timeoutSeconds|rules", "webhooks.clientConfig.service.namespace|name|port")
}

// objects copies objects of the API, each kind to a file.
func (c Config) objects(ctx context.Context, add func(string, []byte)) error {
	if c.Kubeconfig == "" {
		return errors.New("an agent has no kubeconfig of the administrator; make a bundle on a server too")
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return fmt.Errorf("read the administrator's kubeconfig: %w", err)
	}
	config.QPS, config.Burst = 100, 100
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	var errs []error
	for _, k := range kinds() {
		if ctx.Err() != nil {
			errs = append(errs, ctx.Err())
			break
		}
		data, err := k.read(ctx, client.CoreV1().RESTClient())
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", k.name, err))
			continue
		}
		add("objects/"+k.name+".json", data)
	}
	return errors.Join(errs...)
}

// read returns the objects of a kind, as far as they are copied.
func (k kind) read(ctx context.Context, client rest.Interface) ([]byte, error) {
	request := client.Get().AbsPath(k.path).Param("limit", mostObjects)
	allowed := k.fields
	if allowed == nil {
		request = request.SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")
		allowed = fields(metadata, owners)
	} else {
		request = request.SetHeader("Accept", "application/json")
	}
	data, err := request.DoRaw(ctx)
	if err != nil {
		return nil, err
	}
	var list struct {
		Metadata struct {
			Continue string `json:"continue"`
		} `json:"metadata"`
		Items []any `json:"items"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, err
	}
	out := struct {
		More  bool  `json:"more,omitempty"` // than these
		Items []any `json:"items"`
	}{list.Metadata.Continue != "", []any{}}
	for _, item := range list.Items {
		out.Items = append(out.Items, allowed.filter(item))
	}
	return json.MarshalIndent(out, "", " ")
}
